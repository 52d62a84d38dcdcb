// Base class of the backbones with a first and a second moment.
#pragma once

#include "hyper.h"

namespace fused_adaptive {

struct Moments : Backbone {
  static constexpr bool kCorrects = true;

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
  static FA_INLINE void prepare_corrected(Powers powers, Scalars<double>& r) {
    r.numerator = 1 / (1 - powers.first);
    r.scale = 1 / sqrt(1 - powers.second);
  }
  // u = (m/bc1) * r*sqrt(bc2) / (sqrt(v) + eps) if the variance can be rectified [RAdam, Eq. 3 and 4], else m/bc1
  static FA_INLINE void prepare_rectified(const Hyper& h, double t, Powers powers, bool at_five, Scalars<double>& r) {
    const double correction2 = 1 - powers.second;
    const double rho_inf = 2 / (1 - h.beta2) - 1, rho = rho_inf - 2 * t * powers.second / correction2;
    r.numerator = 1 / (1 - powers.first);
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
  // Returns the larger of both; NaN if one of them is NaN.
  template <class T>
  static FA_INLINE T maximum(T a, T b) {
    return ((b > a) | (b != b)) ? b : a;  // || would be a branch in a vectorized loop
  }
  template <bool kMax, class T>
  static FA_INLINE T quotient(const T* s, const Scalars<T>& r) {
    const T second = kMax ? r.uses_max.choose(s[kMax ? 2 : 1], s[1]) : s[1];
    const T denominator = square_root(second) * r.scale + r.eps;
    return r.numerator * s[0] / r.divides.choose(denominator, T(1));
  }
};

}  // namespace fused_adaptive
