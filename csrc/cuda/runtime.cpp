#include "runtime.h"

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

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void Buffer::allocate_zeros(int device, size_t bytes, cudaStream_t stream) {
  allocate(device, bytes);
  check(cudaMemsetAsync(data_.get(), 0, bytes, stream), "cudaMemsetAsync");
}

void Packer::send(Buffer& to, int device, cudaStream_t stream) const {
  to.allocate(device, bytes_.size());
  // The memory is not pinned, so the call returns after it has been read.
  check(cudaMemcpyAsync(to.at<void*>(), bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
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
    launch(kernel, static_cast<unsigned>((words + kThreads - 1) / kThreads), stream, parcel);
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

unsigned grid_size(const void* kernel, int64_t chunks, int device) {
  int processors = 0, blocks = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0), "the occupancy of a kernel");
  return static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(chunks, int64_t{processors} * blocks)));
}

}  // namespace fused_adaptive::cuda
