#include "runtime.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fused_adaptive::cuda {

void check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  throw std::runtime_error(std::string("fused_adaptive: ") + what + " failed: " + cudaGetErrorString(result));
}

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

cudaStream_t current_stream(int device) {
  // Looked up at run time, so that one library loads with every torch. Torch's libraries are not in the global scope.
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  void* stream = nullptr;
  if (function != nullptr && function(device, &stream) != 0) {
    throw std::runtime_error(
        "fused_adaptive: torch does not tell its current CUDA stream; check the driver with nvidia-smi");
  }
  return static_cast<cudaStream_t>(stream);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void Buffer::allocate(size_t bytes) {
  reset();
  check(cudaMalloc(&data_, std::max<size_t>(bytes, 16)), "cudaMalloc");
  check(cudaMemset(data_, 0, bytes), "cudaMemset");
}

void Buffer::reset() {
  // At the end of the process the driver may be gone before us; then the memory is too.
  if (data_ != nullptr) cudaFree(data_);
  data_ = nullptr;
}

void Packer::send(Buffer& to) const {
  to.allocate(bytes_.size());
  check(cudaMemcpy(to.at<void*>(), bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
}

Uploader::Uploader(int device) {
  int driver = 0, major = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  takes_large_ = driver >= 12010 && major >= 7;
}

void Uploader::send(void* to, const void* from, size_t bytes, cudaStream_t stream) const {
  const auto post = [&](auto parcel, auto kernel, int64_t done, int64_t words) {
    parcel.to = static_cast<uint64_t*>(to) + done;
    parcel.words = words;
    std::memcpy(parcel.data, static_cast<const uint64_t*>(from) + done, static_cast<size_t>(words) * 8);
    launch(kernel, 1, stream, parcel);
  };
  const int64_t words = static_cast<int64_t>(bytes / 8);
  for (int64_t done = 0; done < words;) {
    const int64_t left = words - done;
    const bool large = takes_large_ && left > SmallParcel::kWords;
    const int64_t now = std::min(left, large ? LargeParcel::kWords : SmallParcel::kWords);
    if (large) {
      post(LargeParcel{}, large_upload_kernel(), done, now);
    } else {
      post(SmallParcel{}, small_upload_kernel(), done, now);
    }
    done += now;
  }
}

unsigned grid_size(Kernel kernel, int64_t chunks, int device) {
  int processors = 0, blocks = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0), "the occupancy of a kernel");
  return static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(chunks, int64_t{processors} * blocks)));
}

}  // namespace fused_adaptive::cuda
