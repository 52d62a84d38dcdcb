// AdaBelief, as in version 0.2.1 of the authors' package.
#pragma once

#include "moments.h"

namespace fused_adaptive {

template <bool kRectify, bool kAmsgrad>
struct AdaBelief : Moments {
  static constexpr int kStates = kAmsgrad ? 3 : 2;

  static FA_INLINE void prepare(const Hyper& h, const Progress& now, Powers powers, Scalars<double>& r) {
    prepare_moments(h, r);
    if (kRectify) {
      prepare_rectified(h, now.t, powers, /*at_five=*/true, r);
    } else {
      prepare_corrected(powers, r);
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

using AdaBeliefPlain = AdaBelief<false, false>;
using AdaBeliefAmsgrad = AdaBelief<false, true>;
using AdaBeliefRectify = AdaBelief<true, false>;
using AdaBeliefRectifyAmsgrad = AdaBelief<true, true>;

}  // namespace fused_adaptive
