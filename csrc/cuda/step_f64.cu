// Update kernels of f64 parameters, in a separate file for parallel compilation.
#include "kernels.h"
#include "multi_tensor.cuh"

namespace fused_adaptive::cuda {

Kernel update_kernel_f64(int backbone, int mode, bool coupled) {
  return update_kernel<double>(backbone, mode, coupled);
}

}  // namespace fused_adaptive::cuda
