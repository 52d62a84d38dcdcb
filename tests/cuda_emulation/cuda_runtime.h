// The part of the CUDA runtime that csrc/cuda needs, for g++. Kernels run on the CPU, with a fiber for each thread, so
// that barriers, shared memory and the order of blocks work as on a GPU. Device memory is the host's. Launches and
// copies are complete when they return, except that a capture records launches for replays. This tests logic and
// arithmetic, and not speed, memory races or hardware.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

// Runs body once for every thread of every block.
void run(unsigned blocks, unsigned threads, const std::function<void()>& body);
void barrier();
// Waits for the other threads of the warp.
void warp_barrier();
// Ends the launch from one of its threads: run() throws a std::runtime_error.
[[noreturn]] void fail(const std::string& why);
// Returns this block's memory of that name. It is not zeroed, as on a GPU.
void* shared(const void* name, size_t bytes);

extern int processors, blocks_a_processor;
extern bool has_code;  // for the emulated GPU
extern bool is_capturing;
extern int launches;
// Adds a launch to the graph that is being captured; each replay runs it.
void record(std::function<void()> launch);
// A fence: threads that see later writes of this thread see its earlier ones too.
void fence();
// Counts the emulated threads that increment an atomic without a fence since their last barrier.
void count_unfenced();

}  // namespace emulation

extern dim3 threadIdx, blockIdx, gridDim, blockDim;

#define FA_SHARED(Type, name)       \
  static const char name##_tag = 0; \
  Type& name = *static_cast<Type*>(emulation::shared(&name##_tag, sizeof(Type)))

inline void __syncthreads() { emulation::barrier(); }
inline void __threadfence() { emulation::fence(); }
inline unsigned atomicAdd(unsigned* at, unsigned by) {
  emulation::count_unfenced();
  return std::exchange(*at, *at + by);
}
inline unsigned atomicInc(unsigned* at, unsigned most) { return std::exchange(*at, *at >= most ? 0 : *at + 1); }
template <class T>
T __ldcs(const T* from) {
  return *from;
}

enum cudaError_t { cudaSuccess, cudaErrorStreamCaptureUnsupported, cudaErrorNoKernelImageForDevice };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::processors : 9;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = emulation::blocks_a_processor, cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  if (emulation::is_capturing) return cudaErrorStreamCaptureUnsupported;
  return std::memset(data, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (emulation::is_capturing) return cudaErrorStreamCaptureUnsupported;
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return emulation::is_capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return emulation::has_code ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class... Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args...), dim3 blocks, dim3 threads, void** args, size_t, cudaStream_t) {
  const auto call = [&]<size_t... i>(std::index_sequence<i...>) {
    if (emulation::is_capturing) {
      const std::tuple<Args...> kept(*static_cast<Args*>(args[i])...);
      emulation::record([=] { emulation::run(blocks.x, threads.x, [&] { std::apply(kernel, kept); }); });
      return;
    }
    emulation::run(blocks.x, threads.x, [&] { kernel(*static_cast<Args*>(args[i])...); });
  };
  call(std::index_sequence_for<Args...>());
  return cudaSuccess;
}
