// Inner products over tensors, and the gains that they change. Sums are added in the order of gain.h, so the bits do
// not depend on the grid. The last block adds the sums of chunks and adapts the gains.
#pragma once

#include "device.cuh"

namespace fused_adaptive::cuda {

static_assert(kThreads * kLanesOfThread == kLanes, "each thread owns its lanes");

// Before the update, the counts of a tensor do not include the current step.
FA_DEVICE Uncounted uncounted_of(const Step& step, const Launch& launch, int tensor) {
  if (launch.when != When::before_update || grad_of(step, tensor) == nullptr) return {false, 0};
  const Tensor& x = step.tensors[tensor];
  return {true, hyper_of(step, x.group).lr * rate_factor_of(step, x)};
}

FA_DEVICE bool is_sloped(const Step& step, int tensor) {
  const Tensor& x = step.tensors[tensor];
  return has_slope(x.numbers, grad_of(step, tensor) != nullptr, hyper_of(step, x.group).has_rate());
}

FA_DEVICE bool is_due(const Step& step, const Launch& launch) {
  if (launch.when == When::now) return true;
  if (is_skipped(step)) return false;
  const DeviceRule& rule = step.rules[launch.rule];
  if (rule.kind == PolicyKind::hypergradient) return true;
  const int64_t calls = *step.tensors[rule.first_tensor].numbers.tlr_step;
  return ends_at(rule, launch.when == When::before_update ? calls + 1 : calls);
}

// Returns the sum of the lanes of all threads, to thread 0 only.
FA_DEVICE Products block_sum(const double (&num)[kLanesOfThread], const double (&sq)[kLanesOfThread]) {
  struct Sums {
    Products of[kThreads];
  };
  FA_SHARED(Sums, sums);
  static_assert(kLanesOfThread == 4, "pairwise");
  const int thread = threadIdx.x;
  Products sum = {(num[0] + num[1]) + (num[2] + num[3]), (sq[0] + sq[1]) + (sq[2] + sq[3])};
  sums.of[thread] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      sum.num += sums.of[thread + half].num;
      sum.sq += sums.of[thread + half].sq;
      sums.of[thread] = sum;
    }
  }
  __syncthreads();  // before the next call overwrites the sums
  return sum;
}

// ---- work of the last block ----

FA_DEVICE Products sum_share(const Launch& launch, const Share& share) {
  return sum_group(launch.group_sums + share.first_group, share.group_count);
}

// Sets the outcome of a tensor. products: inner products of the whole tensor.
FA_DEVICE void judge_tensor(const Step& step, const Launch& launch, const Rule& rule, int share_index,
                            Products products) {
  const int tensor = launch.shares[share_index].tensor;
  const Tensor& x = step.tensors[tensor];
  const Hyper hyper = hyper_of(step, x.group);
  if (rule.kind == PolicyKind::hypergradient) {
    launch.outcomes[share_index] = outcome_of_slope(products, is_sloped(step, tensor), hyper.lr);
  } else {
    const double lr = launch.when == When::now && rule.has_eta ? *x.numbers.lr_last : hyper.lr;
    launch.outcomes[share_index] =
        outcome_of_interval(rule, x.numbers, products, uncounted_of(step, launch, tensor), lr);
  }
}

// Returns the sums over all tensors of a global policy, in their order.
FA_DEVICE Outcome sum_unit(const Launch& launch) {
  Outcome unit = {{0, 0}, 0, false, false};
  add_in_order(launch.outcomes, launch.share_count, [&](const Outcome& own) { add_outcome(unit, own); });
  return unit;
}

// Adapts the gains to the outcomes and restarts the measured interval.
__device__ FA_NOINLINE inline void adapt_gains(const Step& step, const Launch& launch) {
  FA_SHARED(Outcome, unit);
  FA_SHARED(bool, any_restarts);
  const DeviceRule& rule = step.rules[launch.rule];
  const int thread = threadIdx.x;
  if (thread == 0) any_restarts = false;
  if (thread == 0 && !rule.per_tensor) unit = sum_unit(launch);
  __syncthreads();
  for (int i = thread; i < launch.share_count; i += kThreads) {
    Outcome& own = launch.outcomes[i];
    const Tensor& x = step.tensors[launch.shares[i].tensor];
    adapt_gain(rule, rule.per_tensor ? own : unit, hyper_of(step, x.group).lr_scale, *x.numbers.gain, own);
    if (own.restarts) any_restarts = true;
    // If the measurement is before the update, the last block of the update restarts the counts, since the update still
    // reads them.
    if (rule.kind == PolicyKind::trainable && launch.when != When::before_update) restart_trainable(x.numbers);
  }
  __syncthreads();
  if (!any_restarts) return;
  // This happens only after NaN or infinity, so one block may be slow.
  for (int i = 0; i < launch.share_count; ++i) {
    if (!launch.outcomes[i].restarts) continue;
    const Tensor& x = step.tensors[launch.shares[i].tensor];
    const int64_t words = x.state_is_double ? 2 * x.numel : x.numel;
    for (int64_t word = thread; word < words; word += kThreads) *at<uint32_t>(x, kPrevious, word) = 0;
  }
}

__device__ FA_NOINLINE inline void finish_measurement(const Step& step, const Launch& launch) {
  const DeviceRule& rule = step.rules[launch.rule];
  for (int64_t g = threadIdx.x; g < launch.group_count; g += kThreads) {
    launch.group_sums[g] = sum_group(launch.all_partials + launch.groups[g].first, launch.groups[g].count);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < launch.share_count; i += kThreads) {
    const Share& share = launch.shares[i];
    if (launch.products != nullptr) {
      launch.products[share.tensor] = sum_share(launch, share);
    } else {
      judge_tensor(step, launch, rule, i, sum_share(launch, share));
    }
  }
  if (launch.products != nullptr) return;
  __syncthreads();
  adapt_gains(step, launch);
}

// Continues after products have been summed over the ranks. They are summed even if no interval ends, so they are reset
// to 0 here for such a sum.
__global__ void __launch_bounds__(kThreads)
    finish(const __grid_constant__ Step step, const __grid_constant__ Launch launch) {
  if (is_due(step, launch)) {
    for (int i = threadIdx.x; i < launch.share_count; i += kThreads) {
      judge_tensor(step, launch, step.rules[launch.rule], i, launch.products[launch.shares[i].tensor]);
    }
    __syncthreads();
    adapt_gains(step, launch);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < launch.share_count; i += kThreads) {
    launch.products[launch.shares[i].tensor] = {0, 0};
  }
}

// ---- TrainableLR ----

template <class T>
struct Measure {
  Tensor tensor;
  const void* grad;
  bool measured, wide;
  T applied, travelled, factor;  // divisors of the gradient sum and of the displacement; factor of the gradient
};

template <class T>
__device__ FA_NOINLINE void set_up_measure(const Step& step, const Launch& launch, int tensor, Measure<T>& s) {
  const Tensor& x = step.tensors[tensor];
  s.tensor = x;
  const Uncounted uncounted = uncounted_of(step, launch, tensor);
  s.grad = launch.when == When::before_update ? grad_of(step, tensor) : nullptr;
  s.wide = is_wide(x, s.grad);
  s.measured = is_measurable(step.rules[launch.rule], x.numbers, uncounted);
  s.applied = static_cast<T>(applied_steps(x.numbers, uncounted));
  s.travelled = static_cast<T>(*x.numbers.gain * lr_sum(x.numbers, uncounted));
  s.factor = static_cast<T>(grad_factor_of(step, x));
}

// Adds the products of kWidth adjacent elements to kWidth lanes and starts their new interval.
template <int kWidth, class P>
FA_DEVICE void measure_elements(const Measure<Compute<P>>& s, Source source, int64_t element, double* num, double* sq) {
  using T = Compute<P>;
  const Tensor& x = s.tensor;
  P p[kWidth], g[kWidth];
  T sum[kWidth], start[kWidth], previous[kWidth], now[kWidth];
  int16_t low[kWidth];
  fill(sum, T(0));
  if (source != Source::displacement) load(sum, at<T>(x, kMeanSum, element));
  if (source != Source::gradient) load(p, at<P>(x, kParam, element));
  if (source != Source::gradient) load_low<P>(low, x, Neighbours<kWidth>{element});
  if (s.measured) {
    load(previous, at<T>(x, kPrevious, element));
    if (source != Source::gradient) load(start, at<T>(x, kStart, element));
    if (s.grad != nullptr) load(g, static_cast<const P*>(s.grad) + element);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (source != Source::gradient) now[i] = weight_of(x, p[i], low[i]);
    if (!s.measured) continue;
    if (s.grad != nullptr) sum[i] = sum[i] + static_cast<T>(widen(g[i])) * s.factor;
    const T mean = source == Source::displacement ? T(0) : sum[i] / s.applied;
    const T direction = source == Source::gradient ? mean : (start[i] - now[i]) / s.travelled;
    const double measured = static_cast<double>(source == Source::displacement ? direction : mean);
    num[i] += measured * static_cast<double>(previous[i]);
    sq[i] += measured * static_cast<double>(direction);
    previous[i] = direction;
  }
  if (s.measured) store(previous, at<T>(x, kPrevious, element));
  if (source != Source::gradient) store(now, at<T>(x, kStart, element));
  fill(sum, T(0));
  if (source != Source::displacement) store(sum, at<T>(x, kMeanSum, element));
}

// Calls wide(element) or single(element, lane) for a thread's lanes of a chunk, in ascending rows.
template <class Wide, class Single>
FA_DEVICE void for_lanes(const Chunk& chunk, bool is_wide, const Wide& wide, const Single& single) {
  for (int row = threadIdx.x * kLanesOfThread; row < chunk.count; row += kLanes) {
    if (is_wide && row + kLanesOfThread <= chunk.count) {
      wide(chunk.base + row);
    } else {
      for (int lane = 0; lane < kLanesOfThread && row + lane < chunk.count; ++lane) {
        single(chunk.base + row + lane, lane);
      }
    }
  }
}

// Two blocks per multiprocessor; in double, the registers suffice only for one.
template <class P>
__global__ void __launch_bounds__(kThreads, sizeof(P) == 8 ? 1 : 2)
    measure(const __grid_constant__ Step step, const __grid_constant__ Launch launch) {
  using T = Compute<P>;
  FA_SHARED(Measure<T>, s);
  if (!is_due(step, launch)) return;
  const Source source = step.rules[launch.rule].source;
  const auto prepare = [&](int tensor) {
    if (threadIdx.x == 0) set_up_measure(step, launch, tensor, s);
  };
  for_chunks(launch, prepare, [&](int64_t i, const Chunk& chunk) {
    double num[kLanesOfThread] = {0, 0, 0, 0}, sq[kLanesOfThread] = {0, 0, 0, 0};
    for_lanes(
        chunk, s.wide, [&](int64_t element) { measure_elements<kLanesOfThread, P>(s, source, element, num, sq); },
        [&](int64_t element, int lane) { measure_elements<1, P>(s, source, element, num + lane, sq + lane); });
    const Products sum = block_sum(num, sq);
    if (threadIdx.x == 0) launch.partials[i] = sum;
  });
  if (is_last_block(launch)) finish_measurement(step, launch);
}

// ---- Hypergradient ----

template <class T>
struct Slope {
  Tensor tensor;
  BackboneScalars backbone;
  Scalars<T> scalars;
  const void* grad;
  bool measured, wide;
};

template <class Backbone, class T>
__device__ FA_NOINLINE void set_up_slope(const Step& step, int tensor, Slope<T>& s) {
  const Tensor& x = step.tensors[tensor];
  s.tensor = x;
  s.grad = grad_of(step, tensor);
  s.wide = is_wide(x, s.grad);
  s.measured = is_sloped(step, tensor);
  if (!s.measured) return;
  const Hyper hyper = hyper_of(step, x.group);
  Scalars<double>& r = backbone_scalars<Backbone>(s.backbone, hyper, x.group, {x.numbers.step_count(), 0});
  r.grad_factor = grad_factor_of(step, x);
  r.weight_decay = hyper.weight_decay;
  s.scalars = r.as<T>();
}

template <int kWidth, class Backbone, class P>
FA_DEVICE void slope_elements(const Slope<Compute<P>>& s, int64_t element, double* num) {
  using T = Compute<P>;
  constexpr int kStates = Backbone::kStates;
  const Tensor& x = s.tensor;
  P p[kWidth], g[kWidth];
  T state[kStates > 0 ? kStates : 1][kWidth], direction[kWidth];
  int16_t low[kWidth];
  if (x.coupled) {
    load(p, at<P>(x, kParam, element));
    load_low<P>(low, x, Neighbours<kWidth>{element});
  }
  load(g, static_cast<const P*>(s.grad) + element);
  if (x.stores_direction) {
    load(direction, at<T>(x, kPrevious, element));
  } else {
#pragma unroll
    for (int k = 0; k < kStates; ++k) load(state[k], at<T>(x, kState0 + k, element));
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    T grad = static_cast<T>(widen(g[i])) * s.scalars.grad_factor;
    if (x.coupled) grad = grad + s.scalars.weight_decay * weight_of(x, p[i], low[i]);
    if (!x.stores_direction) {
      T own[kStates > 0 ? kStates : 1];
#pragma unroll
      for (int k = 0; k < kStates; ++k) own[k] = state[k][i];
      direction[i] = Backbone::direction(own, s.scalars);
    }
    num[i] += static_cast<double>(grad) * static_cast<double>(direction[i]);
  }
}

template <class Backbone, class P>
__global__ void __launch_bounds__(kThreads, sizeof(P) == 8 ? 1 : 2)
    slope(const __grid_constant__ Step step, const __grid_constant__ Launch launch) {
  using T = Compute<P>;
  FA_SHARED(Slope<T>, s);
  if (!is_due(step, launch)) return;
  if (threadIdx.x == 0) s.backbone.group = -1;
  const auto prepare = [&](int tensor) {
    raise_powers<Backbone>(step, tensor, /*counted=*/false, s.backbone);
    __syncthreads();
    if (threadIdx.x == 0) set_up_slope<Backbone>(step, tensor, s);
  };
  for_chunks(launch, prepare, [&](int64_t i, const Chunk& chunk) {
    double num[kLanesOfThread] = {0, 0, 0, 0};
    const double none[kLanesOfThread] = {0, 0, 0, 0};
    if (s.measured) {
      for_lanes(
          chunk, s.wide, [&](int64_t element) { slope_elements<kLanesOfThread, Backbone, P>(s, element, num); },
          [&](int64_t element, int lane) { slope_elements<1, Backbone, P>(s, element, num + lane); });
    }
    const Products sum = block_sum(num, none);
    if (threadIdx.x == 0) launch.partials[i] = sum;
  });
  if (is_last_block(launch)) finish_measurement(step, launch);
}

}  // namespace fused_adaptive::cuda
