// The null step: reads and writes the streams of a step and does no arithmetic. How fast it runs is how fast a step
// could be: bench/step/ceilings.py measures it. Not part of any optimizer.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fused_adaptive {

constexpr int kMostWritten = 5, kMostGrads = 2, kMostRead = 2;

// One flat array of n elements each; a word is 2 or 4 bytes of a parameter and its gradient, 4 bytes of state.
struct NullStep {
  void* param;                    // read and written
  void* written[kMostWritten];    // state that is read and written
  const void* grads[kMostGrads];  // read, of the parameter's type: two where a policy makes a pass of its own
  const void* read[kMostRead];    // state that is only read
  int n_written, n_grads, n_read;
  int param_bytes;
  int64_t n;
  // 0, which compilers do not know: what is read has to be, and nothing changes. Tests pass other masks, and see in the
  // result that every element of every array was there.
  uint32_t mask;
};

// The streams of which steps there are: written, grads and read of
//   a backbone with 0 to 3 states; + a sum of gradients (TrainableLR); + a gain and a sum (ActiveLR); + both;
//   Hypergradient's pass over gradient and state.
#define FA_FOR_EACH_STREAMS(X) \
  X(0, 1, 0)                   \
  X(1, 1, 0)                   \
  X(2, 1, 0) X(3, 1, 0) X(4, 1, 0) X(1, 1, 1) X(2, 1, 1) X(3, 1, 1) X(4, 1, 1) X(5, 1, 1) X(1, 2, 1) X(2, 2, 2)

// Calls body(word, written, grads, read) with the numbers as types, so that a loop or kernel is chosen by them; not at
// all where there is no such step.
template <int kValue>
using Number = std::integral_constant<int, kValue>;

template <class Body>
void with_streams(const NullStep& step, const Body& body) {
#define FA_CASE(written, grads, reads)                                              \
  if (step.n_written == written && step.n_grads == grads && step.n_read == reads) { \
    if (step.param_bytes == 4) {                                                    \
      return body(uint32_t{}, Number<written>{}, Number<grads>{}, Number<reads>{}); \
    }                                                                               \
    return body(uint16_t{}, Number<written>{}, Number<grads>{}, Number<reads>{});   \
  }
  FA_FOR_EACH_STREAMS(FA_CASE)
#undef FA_CASE
}

void null_step_cpu(const NullStep& step);
#ifdef FUSED_ADAPTIVE_WITH_CUDA
void null_step_cuda(const NullStep& step, int device);
#endif

}  // namespace fused_adaptive
