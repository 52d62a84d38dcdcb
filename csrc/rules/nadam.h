// Adam with Nesterov momentum, as in torch.optim.NAdam.
#pragma once

#include "moments.h"

namespace fused_adaptive {

struct NAdam : Moments {
  static constexpr int kStates = 2;
  static constexpr bool kStoresDirection = true, kKeepsProduct = true;
  static constexpr double Hyper::* kFirstBase = &Hyper::mu_decay;

  static FA_INLINE void prepare(const Hyper& h, const Progress& now, Powers powers, Scalars<double>& r) {
    prepare_moments(h, r);
    prepare_corrected(powers, r);
    const double mu = momentum_of(h, powers.first), mu_next = momentum_of(h, powers.first * h.mu_decay);
    r.numerator = mu_next / (1 - now.mu_product * mu_next);
    r.grad_numerator = (1 - mu) / (1 - now.mu_product);
  }
  template <class T>
  static FA_INLINE T update(T g, T* s, const Scalars<T>& r) {
    update_mean(g, s, r);
    s[1] = r.decay2 * s[1] + (r.weight2 * g) * g;
    return (r.grad_numerator * g + r.numerator * s[0]) / (square_root(s[1]) * r.scale + r.eps);
  }
  template <class T>
  static FA_INLINE T direction(const T*, const Scalars<T>&) {
    return T(0);  // stored, since it uses the gradient
  }
};

using NAdamPlain = NAdam;

}  // namespace fused_adaptive
