// Update kernels of bf16 parameters, in a separate file for parallel compilation.
#include "kernels.h"
#include "multi_tensor.cuh"

namespace fused_adaptive::cuda {

Kernel update_kernel_bf16(int backbone, int mode, bool coupled) {
  return update_kernel<BFloat16>(backbone, mode, coupled);
}

}  // namespace fused_adaptive::cuda
