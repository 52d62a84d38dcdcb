// Kernels by their compile-time arguments. The executor, which is plain C++, launches them.
#pragma once

#include <cuda_runtime.h>

#include "tables.h"

namespace fused_adaptive::cuda {

Kernel update_kernel_f32(int backbone, int mode, bool coupled);
Kernel update_kernel_f64(int backbone, int mode, bool coupled);
Kernel update_kernel_bf16(int backbone, int mode, bool coupled);
Kernel update_kernel_f16(int backbone, int mode, bool coupled);

// Measures <coupled gradient, direction of the last step> before the step is taken [HD].
Kernel slope_kernel(int backbone, DType param);
// Measures num and sq of TrainableLR. The running interval becomes the previous one.
Kernel measure_kernel(DType param);
// Adapts the gains after inner products have been summed over ranks. One block.
Kernel finish_kernel();
// Ends ActiveLR's interval outside of a step.
Kernel adjust_kernel(DType param);

using SmallUpload = void (*)(SmallParcel);
using LargeUpload = void (*)(LargeParcel);
SmallUpload small_upload_kernel();
LargeUpload large_upload_kernel();

}  // namespace fused_adaptive::cuda
