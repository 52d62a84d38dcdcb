// Update kernels of f32 parameters, in a separate file for parallel compilation.
#include "kernels.h"
#include "multi_tensor.cuh"

namespace fused_adaptive::cuda {

Kernel update_kernel_f32(int backbone, int mode, bool coupled) { return update_kernel<float>(backbone, mode, coupled); }

}  // namespace fused_adaptive::cuda
