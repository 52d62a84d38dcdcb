// Hyperparameters of a param group, and the scalars that are computed from them in each step.
#pragma once

#include "portable.h"

namespace fused_adaptive {

// Hyperparameters of a param group. lr_ref is its reference rate, lr_scale the largest reference rate of the param
// groups that share its scalar gain; mu_decay the factor of one step in the warm-up of NAdam's momentum.
#define FA_FOR_EACH_HYPER(X) \
  X(lr) X(weight_decay) X(beta1) X(beta2) X(eps) X(momentum) X(dampening) X(mu_decay) X(lr_ref) X(lr_scale)
struct Hyper {
#define FA_FIELD(name) double name;
  FA_FOR_EACH_HYPER(FA_FIELD)
#undef FA_FIELD

  // Without a rate a tensor does not move, so its step gives no information on the rate.
  FA_INLINE bool has_rate() const { return lr != 0 && lr_ref != 0; }
};
constexpr int kHypers = sizeof(Hyper) / sizeof(double);

// Two numbers to the power of the step count: that of Backbone::kFirstBase, and beta2.
struct Powers {
  double first, second;
};
template <class Backbone>
FA_INLINE Powers powers_of(const Hyper& h, double t) {
  return {pow(h.*Backbone::kFirstBase, t), pow(h.beta2, t)};
}

// Returns the momentum of a step of NAdam. power: mu_decay to the power of the step count.
FA_INLINE double momentum_of(const Hyper& h, double power) { return h.beta1 * (1 - 0.5 * power); }

// What a tensor has gone through, with the current step.
struct Progress {
  double t;           // step count
  double mu_product;  // NAdam: product of the momenta
};

// Traits of a backbone that are not as they usually are stand in its struct.
struct Backbone {
  static constexpr bool kIsLazy = false, kStoresDirection = false, kCorrects = false, kKeepsProduct = false;
  static constexpr double Hyper::* kFirstBase = &Hyper::beta1;
};

// Scalars that all elements of a tensor share in one step. Computed in double and rounded once.
template <class T>
struct Scalars {
  T grad_factor;                       // 1/grad_scale, negative when maximizing
  T alpha;                             // lr times the gains of the whole tensor
  T weight_decay;                      // coupled: times p, added to the gradient; decoupled: times alpha
  T shrink;                            // decoupled decay without element gains: p -= shrink * p
  T decay1, weight1, decay2, weight2;  // beta1, 1-beta1, beta2, 1-beta2; SGD: momentum, 1-dampening
  T numerator, scale, eps;             // u = numerator*m / (scale*sqrt(v) + eps)
  T grad_numerator;                    // NAdam: grad_numerator*g is added to numerator*m
  T high, low, lowest, highest;        // ActiveLR
  Switch<T> divides;                   // off: u = numerator*m, since the variance cannot be rectified yet
  Switch<T> uses_max;                  // the denominator uses the running maximum
  Switch<T> first;                     // the momentum buffer does not exist yet
  bool holds;                          // ActiveLR keeps the gain if one of the signs is 0

  template <class U>
  FA_INLINE Scalars<U> as() const {
    Scalars<U> r = {U(grad_factor),
                    U(alpha),
                    U(weight_decay),
                    U(shrink),
                    U(decay1),
                    U(weight1),
                    U(decay2),
                    U(weight2),
                    U(numerator),
                    U(scale),
                    U(eps),
                    U(grad_numerator),
                    U(high),
                    U(low),
                    U(lowest),
                    U(highest),
                    {},
                    {},
                    {},
                    holds};
    r.divides = divides;
    r.uses_max = uses_max;
    r.first = first;
    return r;
  }
};

// Sets the scalars that depend on the rate. factor is the gain of the whole tensor times ASLR's random rate. The decay
// is clamped only with an adapting policy, since torch does not clamp it.
FA_INLINE void prepare_rate(const Hyper& h, double factor, bool adapts, Scalars<double>& r) {
  r.alpha = h.lr * factor;
  r.weight_decay = h.weight_decay;
  r.shrink = r.alpha * h.weight_decay;
  if (adapts && r.shrink > 1) r.shrink = 1;
}

}  // namespace fused_adaptive
