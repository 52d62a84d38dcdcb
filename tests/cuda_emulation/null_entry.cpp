// Runs the null step on addresses, for ctypes.
#include <exception>

#include "plan/null.h"

// Returns whether the step was taken.
#pragma GCC visibility push(default)
extern "C" bool emulation_null(void* param, void* const* written, int n_written, const void* const* grads, int n_grads,
                               const void* const* read, int n_read, int param_bytes, int64_t n, uint32_t mask) {
  fused_adaptive::NullStep step = {};
  step.param = param;
  for (int i = 0; i < n_written; ++i) step.written[i] = written[i];
  for (int i = 0; i < n_grads; ++i) step.grads[i] = grads[i];
  for (int i = 0; i < n_read; ++i) step.read[i] = read[i];
  step.n_written = n_written;
  step.n_grads = n_grads;
  step.n_read = n_read;
  step.param_bytes = param_bytes;
  step.n = n;
  step.mask = mask;
  try {
    fused_adaptive::null_step_cuda(step, 0);
    return true;
  } catch (const std::exception&) {  // cannot pass through ctypes
    return false;
  }
}
