// Adam and AdamW, as in torch.optim.
#pragma once

#include "moments.h"

namespace fused_adaptive {

template <bool kAmsgrad>
struct AdamW : Moments {
  static constexpr int kStates = kAmsgrad ? 3 : 2;

  static FA_INLINE void prepare(const Hyper& h, const Progress&, Powers powers, Scalars<double>& r) {
    prepare_moments(h, r);
    prepare_corrected(powers, r);
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

using AdamWPlain = AdamW<false>;
using AdamWAmsgrad = AdamW<true>;

}  // namespace fused_adaptive
