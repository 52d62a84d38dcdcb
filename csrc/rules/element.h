// The skeleton of one element's step, around the backbone: decay, apply, gain, accumulation, interval end. What the CPU
// loops and the CUDA kernels do to each element, whatever brings it there.
#pragma once

#include "backbones.h"

namespace fused_adaptive {

// What an update kernel does besides moving the parameter. The bits are independent.
enum Mode : int {
  kRate = 0,            // one rate for the whole tensor
  kAddsMean = 1,        // + the sum of gradients that TrainableLR takes its mean from
  kScalesElements = 2,  // a rate for each element, and the sum of gradients whose sign ActiveLR compares
  kScalesAndAdds = 3,
};
constexpr int kModes = 4;

template <class T, int kStates>
struct Element {
  T p;
  T state[kStates > 0 ? kStates : 1];
  T mean_sum;  // grad_mean_sum
  T gain;      // element_gain
  T grad_sum;
};

// One step: g is the gradient as it stands in p.grad. Returns the direction u.
template <class Backbone, int kMode, bool kCoupled, class T>
FA_INLINE T step_element(Element<T, Backbone::kStates>& e, T g, const Scalars<T>& r) {
  g = g * r.grad_factor;
  if (kMode & kAddsMean) e.mean_sum = e.mean_sum + g;
  if (kMode & kScalesElements) e.grad_sum = e.grad_sum + g;
  const T u = Backbone::update(kCoupled ? g + r.weight_decay * e.p : g, e.state, r);
  if (kMode & kScalesElements) {
    const T alpha = e.gain * r.alpha;
    if (!kCoupled) {
      const T shrink = alpha * r.weight_decay;
      e.p = e.p - e.p * (shrink < T(1) ? shrink : T(1));
    }
    e.p = e.p - alpha * u;
  } else {
    if (!kCoupled) e.p = e.p - e.p * r.shrink;
    e.p = e.p - r.alpha * u;
  }
  return u;
}

// ActiveLR's interval end [ActiveLR, Algorithm 1]. Signs are compared, never the product of two sums, which underflows.
// Where the sum is not finite the gain shrinks, and the next sign is 0. Gains that hold stay where one of the signs is
// 0.
template <class T>
FA_INLINE void adjust_element(T& gain, T& grad_sum, int8_t& sign_prev, const Scalars<T>& r) {
  const bool finite = is_finite(grad_sum);
  const int sign = finite ? (grad_sum > T(0)) - (grad_sum < T(0)) : 0;
  const int product = sign * static_cast<int>(sign_prev);
  T adjusted = product > 0 ? gain + r.high : gain * r.low;
  adjusted = adjusted < r.lowest ? r.lowest : adjusted;
  adjusted = adjusted > r.highest ? r.highest : adjusted;
  const bool holds = r.holds && finite;
  gain = (holds && product == 0) ? gain : adjusted;
  sign_prev = (holds && sign == 0) ? sign_prev : static_cast<int8_t>(sign);
  grad_sum = T(0);
}

}  // namespace fused_adaptive
