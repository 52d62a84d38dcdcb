// The backbones: how a gradient moves the moments and becomes a direction u. The one native definition: the CPU loops
// and the CUDA kernels include it. The torch definition, which is its oracle, is fused_adaptive/backbones.py.
//
// A backbone is a struct with
//   kStates                      how many arrays of state it has; the order is that of declarations.py's STATE_NAMES
//   kIsLazy                      its state is made by the first update
//   kStoresDirection             Hypergradient cannot tell the last direction from the state
//   prepare(hyper, t, scalars)   the scalars of step t, in double
//   update(g, s, scalars)        moves the state s by the gradient g and returns u
//   direction(s, scalars)        the u that the present state stands for
// To add one: a struct here, a line in FA_FOR_EACH_BACKBONE, and its torch form.
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

enum class Momentum { none, heavy_ball, nesterov };

template <Momentum kMomentum>
struct Sgd {
  static constexpr int kStates = kMomentum == Momentum::none ? 0 : 1;
  static constexpr bool kIsLazy = kMomentum != Momentum::none;
  static constexpr bool kStoresDirection = kMomentum != Momentum::heavy_ball;

  static FA_INLINE void prepare(const Hyper& h, double, Scalars<double>& r) {
    r.decay1 = h.momentum;
    r.weight1 = 1 - h.dampening;
  }
  template <class T>
  static FA_INLINE T update(T g, T* s, const Scalars<T>& r) {
    if (kMomentum == Momentum::none) return g;
    const T moved = r.decay1 * s[0] + r.weight1 * g;
    s[0] = r.first.choose(g, moved);
    return kMomentum == Momentum::nesterov ? g + r.decay1 * s[0] : s[0];
  }
  template <class T>
  static FA_INLINE T direction(const T* s, const Scalars<T>&) {
    return kMomentum == Momentum::none ? T(0) : s[0];
  }
};

// What the backbones with a mean and a second moment share.
struct Moments {
  static constexpr bool kIsLazy = false, kStoresDirection = false;

  static FA_INLINE void prepare_moments(const Hyper& h, Scalars<double>& r) {
    r.decay1 = h.beta1;
    r.weight1 = 1 - h.beta1;
    r.decay2 = h.beta2;
    r.weight2 = 1 - h.beta2;
    r.eps = h.eps;
    r.divides = true;
    r.uses_max = true;
  }
  // u = (m/bc1) / (sqrt(v)/sqrt(bc2) + eps)
  static FA_INLINE void prepare_corrected(const Hyper& h, double t, Scalars<double>& r) {
    r.numerator = 1 / (1 - pow(h.beta1, t));
    r.scale = 1 / sqrt(1 - pow(h.beta2, t));
  }
  // u = (m/bc1) * r*sqrt(bc2) / (sqrt(v) + eps) where the variance can be rectified [RAdam, Eq. 3 and 4], else m/bc1
  static FA_INLINE void prepare_rectified(const Hyper& h, double t, bool at_five, Scalars<double>& r) {
    const double power = pow(h.beta2, t), correction2 = 1 - power;
    const double rho_inf = 2 / (1 - h.beta2) - 1, rho = rho_inf - 2 * t * power / correction2;
    r.numerator = 1 / (1 - pow(h.beta1, t));
    r.scale = 1;
    r.divides = at_five ? rho >= 5 : rho > 5;
    r.uses_max = false;
    if (r.divides) {
      const double rectification = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho));
      r.numerator *= rectification * sqrt(correction2);
    }
  }
  template <class T>
  static FA_INLINE void update_mean(T g, T* s, const Scalars<T>& r) {
    s[0] = r.decay1 * s[0] + r.weight1 * g;
  }
  // The larger; NaN if one of them is.
  template <class T>
  static FA_INLINE T maximum(T a, T b) {
    return ((b > a) | (b != b)) ? b : a;  // no short circuit: it would be a branch in a vector loop
  }
  template <bool kMax, class T>
  static FA_INLINE T quotient(const T* s, const Scalars<T>& r) {
    const T second = kMax ? r.uses_max.choose(s[kMax ? 2 : 1], s[1]) : s[1];
    const T denominator = square_root(second) * r.scale + r.eps;
    return r.numerator * s[0] / r.divides.choose(denominator, T(1));
  }
};

template <bool kAmsgrad>
struct AdamW : Moments {
  static constexpr int kStates = kAmsgrad ? 3 : 2;

  static FA_INLINE void prepare(const Hyper& h, double t, Scalars<double>& r) {
    prepare_moments(h, r);
    prepare_corrected(h, t, r);
  }
  template <class T>
  static FA_INLINE T update(T g, T* s, const Scalars<T>& r) {
    update_mean(g, s, r);
    s[1] = r.decay2 * s[1] + (r.weight2 * g) * g;
    if (kAmsgrad) s[kAmsgrad ? 2 : 1] = maximum(s[kAmsgrad ? 2 : 1], s[1]);
    return direction(s, r);
  }
  template <class T>
  static FA_INLINE T direction(const T* s, const Scalars<T>& r) {
    return quotient<kAmsgrad>(s, r);
  }
};

struct RAdam : Moments {
  static constexpr int kStates = 2;

  static FA_INLINE void prepare(const Hyper& h, double t, Scalars<double>& r) {
    prepare_moments(h, r);
    prepare_rectified(h, t, /*at_five=*/false, r);
  }
  template <class T>
  static FA_INLINE T update(T g, T* s, const Scalars<T>& r) {
    update_mean(g, s, r);
    s[1] = r.decay2 * s[1] + (r.weight2 * g) * g;
    return direction(s, r);
  }
  template <class T>
  static FA_INLINE T direction(const T* s, const Scalars<T>& r) {
    return quotient<false>(s, r);
  }
};

template <bool kRectify, bool kAmsgrad>
struct AdaBelief : Moments {
  static constexpr int kStates = kAmsgrad ? 3 : 2;

  static FA_INLINE void prepare(const Hyper& h, double t, Scalars<double>& r) {
    prepare_moments(h, r);
    if (kRectify) {
      prepare_rectified(h, t, /*at_five=*/true, r);
    } else {
      prepare_corrected(h, t, r);
    }
  }
  template <class T>
  static FA_INLINE T update(T g, T* s, const Scalars<T>& r) {
    update_mean(g, s, r);
    const T surprise = g - s[0];
    s[1] = r.decay2 * s[1] + (r.weight2 * surprise) * surprise + r.eps;
    if (kAmsgrad) s[kAmsgrad ? 2 : 1] = maximum(s[kAmsgrad ? 2 : 1], s[1]);
    return direction(s, r);
  }
  template <class T>
  static FA_INLINE T direction(const T* s, const Scalars<T>& r) {
    return quotient<kAmsgrad>(s, r);
  }
};

using SgdPlain = Sgd<Momentum::none>;
using SgdMomentum = Sgd<Momentum::heavy_ball>;
using SgdNesterov = Sgd<Momentum::nesterov>;
using AdamWPlain = AdamW<false>;
using AdamWAmsgrad = AdamW<true>;
using RAdamPlain = RAdam;
using AdaBeliefPlain = AdaBelief<false, false>;
using AdaBeliefAmsgrad = AdaBelief<false, true>;
using AdaBeliefRectify = AdaBelief<true, false>;
using AdaBeliefRectifyAmsgrad = AdaBelief<true, true>;

// Every backbone's compile-time structure, in the order of their numbers.
#define FA_FOR_EACH_BACKBONE(X) \
  X(SgdPlain)                   \
  X(SgdMomentum)                \
  X(SgdNesterov)                \
  X(AdamWPlain)                 \
  X(AdamWAmsgrad)               \
  X(RAdamPlain)                 \
  X(AdaBeliefPlain)             \
  X(AdaBeliefAmsgrad)           \
  X(AdaBeliefRectify)           \
  X(AdaBeliefRectifyAmsgrad)

enum BackboneId : int {
#define FA_ENUMERATOR(name) k##name,
  FA_FOR_EACH_BACKBONE(FA_ENUMERATOR)
#undef FA_ENUMERATOR
};
constexpr int kBackbones = kAdaBeliefRectifyAmsgrad + 1;

// What has to be known of a backbone outside of its loops.
struct Structure {
  const char* name;
  int states;
  bool is_lazy, stores_direction;
};
constexpr Structure kStructures[kBackbones] = {
#define FA_STRUCTURE(name) {#name, name::kStates, name::kIsLazy, name::kStoresDirection},
    FA_FOR_EACH_BACKBONE(FA_STRUCTURE)
#undef FA_STRUCTURE
};

// The rate part of the scalars. factor: the gains of the whole tensor and ASLR's draw. Only an adapting policy clamps
// the decay: torch does not.
FA_INLINE void prepare_rate(const Hyper& h, double factor, bool adapts, Scalars<double>& r) {
  r.alpha = h.lr * factor;
  r.weight_decay = h.weight_decay;
  r.shrink = r.alpha * h.weight_decay;
  if (adapts && r.shrink > 1) r.shrink = 1;
}

FA_INLINE void prepare_backbone(int backbone, const Hyper& h, double t, Scalars<double>& r) {
  switch (backbone) {
#define FA_CASE(name)       \
  case k##name:             \
    name::prepare(h, t, r); \
    break;
    FA_FOR_EACH_BACKBONE(FA_CASE)
#undef FA_CASE
  }
}

}  // namespace fused_adaptive
