// Step of one element around the backbone: decay, apply, gain, accumulation, interval end. The CPU loops and the CUDA
// kernels share it.
#pragma once

#include "backbones.h"

namespace fused_adaptive {

// What an update kernel does besides updating the parameter. The bits are independent.
enum Mode : int {
  kRate = 0,            // one rate for the whole tensor
  kAddsMean = 1,        // sums gradients for TrainableLR's mean
  kScalesElements = 2,  // a rate for each element; sums gradients for ActiveLR, which compares the signs of sums
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

// Takes one step with g, an element of p.grad, neither unscaled nor negated. Returns the direction u.
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

// Ends ActiveLR's interval for one element [ActiveLR, Algorithm 1]. Signs are compared, since the product of two sums
// could underflow. If the sum is not finite, the gain shrinks and the stored sign is 0. With r.holds, the gain stays if
// one of the signs is 0.
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
