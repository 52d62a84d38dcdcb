// Functions of the CUDA runtime, with exceptions for errors, and functions of torch: memory and streams.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "tables.h"

namespace fused_adaptive::cuda {

// Throws std::runtime_error with `what` and the reason if the result is an error.
void check(cudaError_t result, const char* what);

class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;  // -1: the device did not change
};

// Returns torch's current stream on the device (csrc/bindings/torch_cuda.cpp).
cudaStream_t current_stream(int device);
bool is_capturing(cudaStream_t stream);

// Returns uninitialized memory of torch's allocator on the device, for work on torch's current stream
// (csrc/bindings/torch_cuda.cpp). It can be freed at any time, also during the capture of a CUDA graph.
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

// Uploads several arrays as one block of memory: add() all arrays, then send().
class Packer {
 public:
  // Returns the offset of the array in the block.
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

// Uploads a multiple of 8 bytes in the order of the stream. The bytes are kernel arguments, so no host memory has to
// outlive the call, and a captured graph contains them.
class Uploader {
 public:
  explicit Uploader(int device);
  void send(void* to, const void* from, size_t bytes, cudaStream_t stream) const;

 private:
  bool takes_large_ = false;
};

// Returns the number of blocks that fill the device, at most one per chunk.
unsigned grid_size(const void* kernel, int64_t chunks, int device);
template <class... Args>
unsigned grid_size(void (*kernel)(Args...), int64_t chunks, int device) {
  return grid_size(reinterpret_cast<const void*>(kernel), chunks, device);
}

template <class... Args>
void launch(void (*kernel)(Args...), unsigned blocks, cudaStream_t stream, const Args&... args) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, stream), "a kernel launch");
}

}  // namespace fused_adaptive::cuda
