// Kernels besides the update: inner products, ActiveLR's interval end outside of a step, and uploads.
#include "kernels.h"
#include "multi_tensor.cuh"
#include "reduce.cuh"

namespace fused_adaptive::cuda {
namespace {

// Ends ActiveLR's interval for every tensor with applied steps in it.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    adjust(const __grid_constant__ Step step, const __grid_constant__ Launch launch) {
  struct Shared {
    Scalars<T> scalars;
    ActiveEnd end;
  };
  FA_SHARED(Shared, s);
  const auto prepare = [&](int tensor) {
    if (threadIdx.x != 0) return;
    const Tensor& x = step.tensors[tensor];
    Scalars<double> r = {};
    prepare_active(step.rules[x.active], hyper_of(step, x.group), r);
    s.scalars = r.as<T>();
    s.end = end_by_hand(x.numbers);
  };
  for_chunks(launch, prepare, [&](int64_t, const Chunk& chunk) {
    if (s.end.ends) end_chunk(step.tensors[chunk.tensor], s.scalars, chunk.base, chunk.count, s.end.adjusts);
  });
  if (!is_last_block(launch)) return;
  for (int i = threadIdx.x; i < step.tensor_count; i += kThreads) {
    const Tensor& x = step.tensors[i];
    if (x.active >= 0) restart_active(x.numbers);
  }
}

template <class Backbone>
Kernel slope_kernel_of(DType param) {
  switch (param) {
    case DType::f64:
      return slope<Backbone, double>;
    case DType::bf16:
      return slope<Backbone, BFloat16>;
    case DType::f16:
      return slope<Backbone, Half>;
    default:
      return slope<Backbone, float>;
  }
}

// One word per thread. Threads that read different addresses of the arguments are serialized, so the work is divided
// among blocks.
template <class P>
__global__ void __launch_bounds__(kThreads) upload(const __grid_constant__ P parcel) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < parcel.words) parcel.to[i] = parcel.data[i];
}

}  // namespace

Kernel slope_kernel(int backbone, DType param) {
  switch (backbone) {
#define FA_CASE(name) \
  case k##name:       \
    return slope_kernel_of<name>(param);
    FA_FOR_EACH_BACKBONE(FA_CASE)
#undef FA_CASE
  }
  return nullptr;
}

Kernel measure_kernel(DType param) {
  switch (param) {
    case DType::f64:
      return measure<double>;
    case DType::bf16:
      return measure<BFloat16>;
    case DType::f16:
      return measure<Half>;
    default:
      return measure<float>;
  }
}

Kernel finish_kernel() { return finish; }

Kernel adjust_kernel(DType param) { return param == DType::f64 ? adjust<double> : adjust<float>; }

SmallUpload small_upload_kernel() { return upload<SmallParcel>; }
LargeUpload large_upload_kernel() { return upload<LargeParcel>; }

}  // namespace fused_adaptive::cuda
