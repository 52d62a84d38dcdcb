// Update kernel: one launch updates every tensor of a bucket. The math of an element is in element.h.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace fused_adaptive::cuda {

// Data that the threads of a block share while it works on one tensor.
template <class T>
struct Setup {
  Tensor tensor;
  Values values;
  BackboneScalars backbone;
  Scalars<T> scalars;
  const void* grad;
  bool steps;  // the tensor has a gradient
  bool wide;   // accesses of 16 bytes
  bool adds;   // the gradient is added to grad_mean_sum
  ActiveEnd end;
  uint32_t rounding_step;
};

// A block that starts with another tensor calls fetch(), which reads device memory, then set_up() in one thread. Both
// are not inlined, so that the loop over elements does not need their registers.
template <class T>
__device__ FA_NOINLINE void fetch(const Step& step, int tensor, Setup<T>& s) {
  constexpr int kWords = sizeof(Tensor) / 8;
  static_assert(sizeof(Tensor) % 8 == 0 && kWords < kThreads, "one word a thread");
  const Tensor& x = step.tensors[tensor];
  const int thread = threadIdx.x;
  if (thread == 0) {
    s.grad = grad_of(step, tensor);
    s.values = values_at(x.numbers);
  }
  if (thread < kWords) reinterpret_cast<uint64_t*>(&s.tensor)[thread] = reinterpret_cast<const uint64_t*>(&x)[thread];
}

template <class Backbone, int kMode, class T>
__device__ FA_NOINLINE void set_up(const Step& step, Setup<T>& s) {
  const Tensor& x = s.tensor;
  s.steps = s.grad != nullptr;
  s.wide = is_wide(x, s.grad);
  s.end = {};
  s.adds = false;
  const Numbers n = s.values.numbers();
  s.rounding_step = static_cast<uint32_t>(s.values.counts.rounding_step);
  const double t = s.values.counts.step + 1;
  const Hyper hyper = hyper_of(step, x.group);
  Progress now = {t, 1};
  if constexpr (Backbone::kKeepsProduct) {
    now.mu_product = n.next_product(momentum_of(hyper, s.backbone.powers.first));
  }
  Scalars<double>& r = backbone_scalars<Backbone>(s.backbone, hyper, x.group, now);
  prepare_rate(hyper, rate_factor_of(step, x) * s.values.gain, x.adapts, r);
  r.grad_factor = grad_factor_of(step, x);
  r.first = t == 1;
  if (kMode & kScalesElements) {
    const Rule& rule = step.rules[x.active];
    s.end = end_in_step(rule, n, s.steps, hyper.has_rate());
    prepare_active(rule, hyper, r);
  }
  if (kMode & kAddsMean) {
    s.adds = adds_mean(step.rules[x.scalar], n);
  }
  s.scalars = r.as<T>();
}

// Whether an update may have to store the direction, for Hypergradient.
template <class Backbone, int kMode>
constexpr bool kMayStore = kMode == kRate && Backbone::kStoresDirection;

// Updates some elements: all loads, then the arithmetic, then all stores.
template <class Backbone, int kMode, bool kCoupled, class P, class Where>
FA_DEVICE void update_elements(const Setup<Compute<P>>& s, const Scalars<Compute<P>>& r, const Where& where) {
  constexpr int kWidth = Where::kCount;
  using T = Compute<P>;
  constexpr int kStates = Backbone::kStates;
  constexpr bool kScales = (kMode & kScalesElements) != 0, kAdds = (kMode & kAddsMean) != 0;
  const Tensor& x = s.tensor;
  P p[kWidth], g[kWidth];
  T state[kStates > 0 ? kStates : 1][kWidth], mean_sum[kWidth], gain[kWidth], grad_sum[kWidth], direction[kWidth],
      weight[kWidth];
  int8_t sign[kWidth];
  int16_t low[kWidth];

  load_low<P>(low, x, where);
  where.load(p, at<P>(x, kParam));
  where.template load</*kOnce=*/true>(g, static_cast<const P*>(s.grad));
#pragma unroll
  for (int k = 0; k < kStates; ++k) where.load(state[k], at<T>(x, kState0 + k));
  if constexpr (kScales) {
    where.load(gain, at<T>(x, kGain));
    fill(grad_sum, T(0));
    if (!s.end.fresh) where.load(grad_sum, at<T>(x, kGradSum));
  }
  if constexpr (kAdds) {
    fill(mean_sum, T(0));
    if (s.adds) where.load(mean_sum, at<T>(x, kMeanSum));
  }

#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    Element<T, kStates> e;
    e.p = weight_of(x, p[i], low[i]);
#pragma unroll
    for (int k = 0; k < kStates; ++k) e.state[k] = state[k][i];
    if constexpr (kAdds) e.mean_sum = mean_sum[i];
    if constexpr (kScales) e.gain = gain[i];
    if constexpr (kScales) e.grad_sum = grad_sum[i];
    direction[i] = step_element<Backbone, kMode, kCoupled>(e, static_cast<T>(widen(g[i])), r);
    weight[i] = e.p;
#pragma unroll
    for (int k = 0; k < kStates; ++k) state[k][i] = e.state[k];
    if constexpr (kAdds) mean_sum[i] = e.mean_sum;
    if constexpr (kScales) grad_sum[i] = e.grad_sum;
  }

  // The barrier makes the compiler read the addresses of arrays from shared memory again, so they take no registers
  // during the arithmetic.
  if constexpr (kScales || kAdds || !Where::kAtOnce) asm volatile("" ::: "memory");
  store_weights<P>(weight, x, s.rounding_step, where);
#pragma unroll
  for (int k = 0; k < kStates; ++k) where.store(state[k], at<T>(x, kState0 + k));
  if constexpr (kScales) {
    if (s.end.adjusts) {
      where.load(sign, at<int8_t>(x, kSignPrev));  // not with the other loads, since it would take registers
      // Scalars of this rare case are read from shared memory each time and take no registers.
#pragma unroll
      for (int i = 0; i < kWidth; ++i) adjust_element(gain[i], grad_sum[i], sign[i], s.scalars);
      where.store(gain, at<T>(x, kGain));
      where.store(sign, at<int8_t>(x, kSignPrev));
    }
    if (s.end.ends) fill(grad_sum, T(0));
    where.store(grad_sum, at<T>(x, kGradSum));
  }
  if constexpr (kAdds) {
    if (s.adds) where.store(mean_sum, at<T>(x, kMeanSum));
  }
  if constexpr (kMayStore<Backbone, kMode>) {
    if (x.stores_direction) where.store(direction, at<T>(x, kPrevious));
  }
}

// Ends ActiveLR's interval for elements that no step updates now. This is rare, so accesses are not wide.
// adjusts: the last step could move the elements.
template <class T>
__device__ FA_NOINLINE void end_chunk(const Tensor& x, const Scalars<T>& r, int64_t base, int count, bool adjusts) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int64_t element = base + i;
    T& grad_sum = *at<T>(x, kGradSum, element);
    if (adjusts) adjust_element(*at<T>(x, kGain, element), grad_sum, *at<int8_t>(x, kSignPrev, element), r);
    grad_sum = T(0);
  }
}

// Updates counts and sums of rates of all tensors. The last block of an update calls it.
__device__ FA_NOINLINE inline void count_update(const Step& step) {
  for (int i = threadIdx.x; i < step.tensor_count; i += kThreads) {
    const Tensor& x = step.tensors[i];
    const bool applied = grad_of(step, i) != nullptr;
    Values values = values_at(x.numbers);
    const Numbers n = values.numbers();
    if (applied) n.count_rounding();
    if (applied && x.numbers.mu_product != nullptr) {
      n.set_product(n.next_product(momentum_in_step(step, x.group, n.step_count() + 1)));
    }
    if (applied) n.count_step();
    const Hyper hyper = hyper_of(step, x.group);
    if (x.active >= 0) count_active(step.rules[x.active], n, applied, hyper.has_rate());
    if (x.scalar >= 0) count_scalar(step.rules[x.scalar], n, applied, hyper.lr, rate_factor_of(step, x));
    asm volatile("" ::: "memory");  // reads the addresses again, so they take no registers until here
    put_counts(values, x.numbers);
  }
}

// Elements in 16 bytes of parameters.
template <class P>
constexpr int kVector = 16 / sizeof(P);

template <class Backbone, int kMode>
constexpr int kArrays = 2 + Backbone::kStates + ((kMode & kScalesElements) ? 2 : 0) + ((kMode & kAddsMean) ? 1 : 0) +
                        kMayStore<Backbone, kMode>;

// Elements at a time without wide accesses, for arrays that are not aligned and for the end of a chunk. With more,
// fewer blocks would fit on a multiprocessor, or registers would spill.
template <class Backbone, int kMode, class P>
constexpr int kRows = kArrays<Backbone, kMode> >= 6                     ? 1
                      : sizeof(P) == 4 && kArrays<Backbone, kMode> <= 4 ? 4
                                                                        : 2;

template <class Backbone, int kMode, class P>
constexpr int blocks_at_once() {
  return blocks_at_once(sizeof(P), kArrays<Backbone, kMode>, kMode == kScalesElements);
}

template <class Backbone, int kMode, bool kCoupled, class P>
__global__ void __launch_bounds__(kThreads, (blocks_at_once<Backbone, kMode, P>()))
    update(const __grid_constant__ Step step, const __grid_constant__ Launch launch) {
  using T = Compute<P>;
  FA_SHARED(Setup<T>, s);
  if (is_skipped(step)) return;
  const int thread = threadIdx.x;
  if (thread == 0) s.backbone.group = -1;
  const auto prepare = [&](int tensor) {
    fetch(step, tensor, s);
    raise_powers<Backbone>(step, tensor, /*counted=*/true, s.backbone);
    __syncthreads();
    if (thread == 0) set_up<Backbone, kMode>(step, s);
  };
  for_chunks(launch, prepare, [&](int64_t, const Chunk& chunk) {
    if (s.steps) {
      // The scalars are kept in registers. With element gains arrays need all registers, so the scalars are read from
      // shared memory.
      using Kept = const Scalars<T>;
      std::conditional_t<(kMode & kScalesElements) != 0, Kept&, Kept> r = s.scalars;
      const int wide = s.wide ? chunk.count / kVector<P> * kVector<P> : 0;
      for (int e = thread * kVector<P>; e < wide; e += kThreads * kVector<P>) {
        update_elements<Backbone, kMode, kCoupled, P>(s, r, Neighbours<kVector<P>>{chunk.base + e});
      }
      for (int e = wide + thread; e < chunk.count; e += kThreads * kRows<Backbone, kMode, P>) {
        const Column<kRows<Backbone, kMode, P>> rows = {chunk.base + e, chunk.count - e};
        update_elements<Backbone, kMode, kCoupled, P>(s, r, rows);
      }
    } else if constexpr ((kMode & kScalesElements) != 0) {
      if (s.end.ends) end_chunk(s.tensor, s.scalars, chunk.base, chunk.count, s.end.adjusts);
    }
  });
  if (is_last_block(launch)) count_update(step);
}

// Returns the kernel of one parameter type.
template <class P>
Kernel update_kernel(int backbone, int mode, bool coupled) {
#define FA_MODE(name, mode) {update<name, mode, false, P>, update<name, mode, true, P>}
#define FA_BACKBONE(name) \
  {FA_MODE(name, kRate), FA_MODE(name, kAddsMean), FA_MODE(name, kScalesElements), FA_MODE(name, kScalesAndAdds)},
  static const Kernel kernels[kBackbones][kModes][2] = {FA_FOR_EACH_BACKBONE(FA_BACKBONE)};
#undef FA_BACKBONE
#undef FA_MODE
  return kernels[backbone][mode][coupled];
}

}  // namespace fused_adaptive::cuda
