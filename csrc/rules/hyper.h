// The numbers of a param group, and what becomes of them before a step: scalars that all elements of a tensor share.
#pragma once

#include "portable.h"

namespace fused_adaptive {

// Hyperparameters of a param group. lr_ref: its reference rate; lr_scale: the largest one of the groups under its
// scalar gain.
#define FA_FOR_EACH_HYPER(X) \
  X(lr) X(weight_decay) X(beta1) X(beta2) X(eps) X(momentum) X(dampening) X(lr_ref) X(lr_scale)
struct Hyper {
#define FA_FIELD(name) double name;
  FA_FOR_EACH_HYPER(FA_FIELD)
#undef FA_FIELD

  // Without a rate a tensor cannot move, and teaches nothing.
  FA_INLINE bool has_rate() const { return lr != 0 && lr_ref != 0; }
};
constexpr int kHypers = sizeof(Hyper) / sizeof(double);

// beta1 and beta2 to the power of the number of steps.
struct Powers {
  double beta1, beta2;
};
FA_INLINE Powers powers_of(const Hyper& h, double t) { return {pow(h.beta1, t), pow(h.beta2, t)}; }

// What all elements of a tensor share in one step. Computed in double and rounded once.
template <class T>
struct Scalars {
  T grad_factor;                       // 1/grad_scale, negative when maximizing
  T alpha;                             // lr times the gains of the whole tensor
  T weight_decay;                      // coupled: added to the gradient as often; decoupled: times alpha
  T shrink;                            // decoupled decay without element gains: p loses this part of itself
  T decay1, weight1, decay2, weight2;  // beta1, 1-beta1, beta2, 1-beta2; SGD: momentum, 1-dampening
  T numerator, scale, eps;             // u = numerator*m / (scale*sqrt(v) + eps)
  T high, low, lowest, highest;        // ActiveLR
  Switch<T> divides;                   // off: u = numerator*m (a moment that cannot be rectified yet)
  Switch<T> uses_max;                  // the denominator is the running maximum
  Switch<T> first;                     // the momentum buffer does not exist yet
  bool holds;                          // ActiveLR leaves gains where there is nothing to compare

  template <class U>
  FA_INLINE Scalars<U> as() const {
    Scalars<U> r = {U(grad_factor), U(alpha),   U(weight_decay), U(shrink), U(decay1), U(weight1),
                    U(decay2),      U(weight2), U(numerator),    U(scale),  U(eps),    U(high),
                    U(low),         U(lowest),  U(highest),      {},        {},        {},
                    holds};
    r.divides = divides;
    r.uses_max = uses_max;
    r.first = first;
    return r;
  }
};

// The rate part of the scalars. factor: the gains of the whole tensor and ASLR's draw. Only an adapting policy clamps
// the decay: torch does not.
FA_INLINE void prepare_rate(const Hyper& h, double factor, bool adapts, Scalars<double>& r) {
  r.alpha = h.lr * factor;
  r.weight_decay = h.weight_decay;
  r.shrink = r.alpha * h.weight_decay;
  if (adapts && r.shrink > 1) r.shrink = 1;
}

}  // namespace fused_adaptive
