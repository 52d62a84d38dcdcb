// SGD with momentum, dampening and Nesterov momentum, as in torch.optim.SGD.
#pragma once

#include "hyper.h"

namespace fused_adaptive {

enum class Momentum { none, heavy_ball, nesterov };

template <Momentum kMomentum>
struct Sgd : Backbone {
  static constexpr int kStates = kMomentum == Momentum::none ? 0 : 1;
  static constexpr bool kIsLazy = kMomentum != Momentum::none;
  static constexpr bool kStoresDirection = kMomentum != Momentum::heavy_ball;

  static FA_INLINE void prepare(const Hyper& h, const Progress&, Powers, Scalars<double>& r) {
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

using SgdPlain = Sgd<Momentum::none>;
using SgdMomentum = Sgd<Momentum::heavy_ball>;
using SgdNesterov = Sgd<Momentum::nesterov>;

}  // namespace fused_adaptive
