// Null step: reads and writes the arrays of a step without its arithmetic. Its speed is the upper bound of the speed of
// a step, which bench/step/ceilings.py measures. It is not part of any optimizer.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fused_adaptive {

constexpr int kMostWritten = 5, kMostGrads = 2, kMostRead = 2;

// Flat arrays of n elements each. An element has 2 or 4 bytes in a parameter and its gradient, 4 bytes in the state.
struct NullStep {
  void* param;                    // read and written
  void* written[kMostWritten];    // state that is read and written
  const void* grads[kMostGrads];  // read, of the parameter's type; two if a policy reads the gradient in its own pass
  const void* read[kMostRead];    // state that is only read
  int n_written, n_grads, n_read;
  int param_bytes;
  int64_t n;
  // The mask is 0, so nothing changes. Compilers do not know its value, so they cannot remove reads. Tests pass other
  // masks and check in the result that every element of every array was read.
  uint32_t mask;
};

// Numbers of written arrays, gradients and read arrays of the steps that exist: a backbone with 0 to 3 states, without
// or with a sum of gradients (TrainableLR), a gain and a sum (ActiveLR), or both; and Hypergradient's extra pass over
// gradient and state.
#define FA_FOR_EACH_STREAMS(X) \
  X(0, 1, 0)                   \
  X(1, 1, 0)                   \
  X(2, 1, 0) X(3, 1, 0) X(4, 1, 0) X(1, 1, 1) X(2, 1, 1) X(3, 1, 1) X(4, 1, 1) X(5, 1, 1) X(1, 2, 1) X(2, 2, 2)

// Calls body(word, written, grads, read) with the numbers as types, which select a loop or kernel. Does not call it if
// no step has these numbers.
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
