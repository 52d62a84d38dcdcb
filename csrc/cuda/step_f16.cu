// The update kernels of f16 parameters, in a file of their own so that they compile side by side.
#include "kernels.h"
#include "multi_tensor.cuh"

namespace fused_adaptive::cuda {

Kernel update_kernel_f16(int backbone, int mode, bool coupled) { return update_kernel<Half>(backbone, mode, coupled); }

}  // namespace fused_adaptive::cuda
