// The CUDA runtime as the executor uses it, errors as exceptions, and what it has from torch: memory, streams.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "tables.h"

namespace fused_adaptive::cuda {

// Throws std::runtime_error that says what failed and why.
void check(cudaError_t result, const char* what);

class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;  // -1: it was the same
};

// Torch's current stream on the device (csrc/bindings/torch_cuda.cpp).
cudaStream_t current_stream(int device);
bool is_capturing(cudaStream_t stream);

// Memory of torch's allocator on the device, for work in the order of torch's current stream
// (csrc/bindings/torch_cuda.cpp). It can be given back at any time, in anybody's capture of a CUDA graph too. What is
// in it is undefined.
std::shared_ptr<void> allocate(int device, size_t bytes);

// Device memory.
class Buffer {
 public:
  void allocate(int device, size_t bytes) { data_ = cuda::allocate(device, bytes); }
  void allocate_zeros(int device, size_t bytes, cudaStream_t stream);
  template <class E>
  E* at(size_t offset = 0) const {
    return reinterpret_cast<E*>(static_cast<char*>(data_.get()) + offset);
  }
  const std::shared_ptr<void>& memory() const { return data_; }

 private:
  std::shared_ptr<void> data_;
};

// Brings arrays to the device as one block: add them all, then send.
class Packer {
 public:
  // Returns where the array will be in the block.
  template <class E>
  size_t add(const std::vector<E>& values) {
    const size_t offset = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(offset + values.size() * sizeof(E));
    if (!values.empty()) std::memcpy(bytes_.data() + offset, values.data(), values.size() * sizeof(E));
    return offset;
  }
  void send(Buffer& to, int device, cudaStream_t stream) const;
  size_t size() const { return bytes_.size(); }

 private:
  std::vector<char> bytes_;
};

// Writes to the device in the order of the stream, without host memory that has to outlive the call: the bytes travel
// in the arguments of kernels, so a captured graph has them too. A multiple of 8 bytes.
class Uploader {
 public:
  explicit Uploader(int device);
  void send(void* to, const void* from, size_t bytes, cudaStream_t stream) const;

 private:
  bool takes_large_ = false;
};

// Blocks that fill the device: at most one a chunk, and at most so many on a multiprocessor.
unsigned grid_size(const void* kernel, int64_t chunks, int device, int most = kMostBlocks);
template <class... Args>
unsigned grid_size(void (*kernel)(Args...), int64_t chunks, int device, int most = kMostBlocks) {
  return grid_size(reinterpret_cast<const void*>(kernel), chunks, device, most);
}

template <class... Args>
void launch(void (*kernel)(Args...), unsigned blocks, cudaStream_t stream, const Args&... args) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, stream), "a kernel launch");
}

}  // namespace fused_adaptive::cuda
