// Rectified Adam, as in torch.optim.RAdam.
#pragma once

#include "moments.h"

namespace fused_adaptive {

struct RAdam : Moments {
  static constexpr int kStates = 2;

  static FA_INLINE void prepare(const Hyper& h, const Progress& now, Powers powers, Scalars<double>& r) {
    prepare_moments(h, r);
    prepare_rectified(h, now.t, powers, /*at_five=*/false, r);
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

using RAdamPlain = RAdam;

}  // namespace fused_adaptive
