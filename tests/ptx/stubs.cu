// For quick builds: update kernels of AdamW in float32 with decoupled decay, instead of the step_*.cu.
#include "cuda/kernels.h"
#include "cuda/multi_tensor.cuh"

namespace fused_adaptive::cuda {

Kernel update_kernel_f32(int, int mode, bool) {
  static const Kernel kernels[kModes] = {
      update<AdamWPlain, kRate, false, float>, update<AdamWPlain, kAddsMean, false, float>,
      update<AdamWPlain, kScalesElements, false, float>, update<AdamWPlain, kScalesAndAdds, false, float>};
  return kernels[mode];
}
Kernel update_kernel_f64(int, int, bool) { return nullptr; }
Kernel update_kernel_bf16(int, int, bool) { return nullptr; }
Kernel update_kernel_f16(int, int, bool) { return nullptr; }

}  // namespace fused_adaptive::cuda
