// The kernels by their compile-time structure: what the executor, which is plain C++, launches.
#pragma once

#include <cuda_runtime.h>

#include "tables.h"

namespace fused_adaptive::cuda {

Kernel update_kernel_f32(int backbone, int mode, bool coupled);
Kernel update_kernel_f64(int backbone, int mode, bool coupled);
Kernel update_kernel_bf16(int backbone, int mode, bool coupled);
Kernel update_kernel_f16(int backbone, int mode, bool coupled);

// <coupled gradient, direction of the last step>, before it is taken [HD].
Kernel slope_kernel(int backbone, DType param);
// num and sq of TrainableLR; the running interval becomes the previous one.
Kernel measure_kernel(DType param);
// The gains, where inner products had to be summed over ranks first. One block.
Kernel finish_kernel();
// ActiveLR's interval end outside of a step.
Kernel adjust_kernel(DType param);

using SmallUpload = void (*)(SmallParcel);
using LargeUpload = void (*)(LargeParcel);
SmallUpload small_upload_kernel();
LargeUpload large_upload_kernel();

}  // namespace fused_adaptive::cuda
