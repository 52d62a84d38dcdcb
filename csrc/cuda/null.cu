// Null step on a GPU: threads, chunks, vectors and the order of accesses as in multi_tensor.cuh, without arithmetic.
#include <stdexcept>

#include "device.cuh"
#include "plan/null.h"
#include "runtime.h"

namespace fused_adaptive::cuda {
namespace {

// Passes over kWidth adjacent elements: all loads, then all stores.
template <int kWidth, class Word, int kWritten, int kGrads, int kRead>
FA_DEVICE void pass_elements(const NullStep& s, int64_t element) {
  Word p[kWidth], g[kGrads][kWidth];
  uint32_t w[kWritten > 0 ? kWritten : 1][kWidth], r[kRead > 0 ? kRead : 1][kWidth];
  load(p, static_cast<const Word*>(s.param) + element);
#pragma unroll
  for (int k = 0; k < kGrads; ++k) load</*kOnce=*/true>(g[k], static_cast<const Word*>(s.grads[k]) + element);
#pragma unroll
  for (int k = 0; k < kWritten; ++k) load(w[k], static_cast<const uint32_t*>(s.written[k]) + element);
#pragma unroll
  for (int k = 0; k < kRead; ++k) load(r[k], static_cast<const uint32_t*>(s.read[k]) + element);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    Word grads = 0;
    uint32_t reads = 1;
#pragma unroll
    for (int k = 0; k < kGrads; ++k) grads = static_cast<Word>(grads ^ g[k][i]);
#pragma unroll
    for (int k = 0; k < kRead; ++k) reads = reads ^ r[k][i];
    p[i] = static_cast<Word>(p[i] ^ (grads & static_cast<Word>(s.mask)));
#pragma unroll
    for (int k = 0; k < kWritten; ++k) w[k][i] = w[k][i] ^ (reads & s.mask);
  }
  store(p, static_cast<Word*>(s.param) + element);
#pragma unroll
  for (int k = 0; k < kWritten; ++k) store(w[k], static_cast<uint32_t*>(s.written[k]) + element);
}

// As for the update kernels. In a step, the only array that is read but not written is ActiveLR's gain.
template <class Word, int kWritten, int kGrads, int kRead>
constexpr int blocks_at_once() {
  return cuda::blocks_at_once(sizeof(Word), 1 + kWritten + kGrads + kRead, kGrads == 1 && kRead == 1);
}

__device__ uint32_t tickets = 0;  // one counter suffices, since null steps run one after another

template <class Word, int kWritten, int kGrads, int kRead>
__global__ void __launch_bounds__(kThreads, (blocks_at_once<Word, kWritten, kGrads, kRead>()))
    null_pass(const __grid_constant__ NullStep step, int64_t chunks) {
  constexpr int kWide = 16 / sizeof(Word);
  for_turns({chunks, &tickets}, [&](int64_t chunk) {
    const int64_t base = chunk * kUpdateChunk, left = step.n - base;
    const int count = static_cast<int>(left < kUpdateChunk ? left : kUpdateChunk), wide = count / kWide * kWide;
    for (int e = threadIdx.x * kWide; e < wide; e += kThreads * kWide) {
      pass_elements<kWide, Word, kWritten, kGrads, kRead>(step, base + e);
    }
    for (int e = wide + threadIdx.x; e < count; e += kThreads) {
      pass_elements<1, Word, kWritten, kGrads, kRead>(step, base + e);
    }
  });
}

using NullKernel = void (*)(NullStep, int64_t);

template <class Word, int kWritten, int kGrads, int kRead>
NullKernel kernel_of(Number<kWritten>, Number<kGrads>, Number<kRead>) {
  return null_pass<Word, kWritten, kGrads, kRead>;
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace
}  // namespace fused_adaptive::cuda

namespace fused_adaptive {

void null_step_cuda(const NullStep& step, int device) {
  using namespace cuda;
  bool wide = aligned(step.param);
  for (int i = 0; i < step.n_written; ++i) wide = wide && aligned(step.written[i]);
  for (int i = 0; i < step.n_grads; ++i) wide = wide && aligned(step.grads[i]);
  for (int i = 0; i < step.n_read; ++i) wide = wide && aligned(step.read[i]);
  if (!wide) throw std::runtime_error("null_step: every array must begin at a multiple of 16 bytes");
  const DeviceGuard guard(device);
  NullKernel kernel = nullptr;
  with_streams(step, [&](auto word, auto written, auto grads, auto read) {
    kernel = kernel_of<decltype(word)>(written, grads, read);
  });
  const int64_t chunks = (step.n + kUpdateChunk - 1) / kUpdateChunk;
  launch(kernel, grid_size(kernel, chunks, device), current_stream(device), step, chunks);
}

}  // namespace fused_adaptive
