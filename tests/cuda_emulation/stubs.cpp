// For quick builds: one update kernel, instead of the step_*.cu.
#include "cuda/kernels.h"
#include "cuda/multi_tensor.cuh"

namespace fused_adaptive::cuda {

Kernel update_kernel_f32(int, int, bool) { return update<AdamWPlain, kScalesElements, false, float>; }
Kernel update_kernel_f64(int, int, bool) { return nullptr; }
Kernel update_kernel_bf16(int, int, bool) { return nullptr; }
Kernel update_kernel_f16(int, int, bool) { return nullptr; }

}  // namespace fused_adaptive::cuda
