// The backbones: how a gradient moves the moments and becomes a direction u. The one native definition: the CPU loops
// and the CUDA kernels include it. The torch definition, which is its oracle, is fused_adaptive/core/backbone.py.
//
// A backbone is a struct with
//   kStates                      how many arrays of state it has; the order is that of declarations.py's STATE_NAMES
//   kIsLazy                      its state is made by the first update
//   kStoresDirection             Hypergradient cannot tell the last direction from the state
//   kCorrects                    prepare() asks for the powers
//   prepare(hyper, t, powers, r) the scalars r of step t, in double
//   update(g, s, scalars)        moves the state s by the gradient g and returns u
//   direction(s, scalars)        the u that the present state stands for
// To add one: a header with the struct, its include and a line in FA_FOR_EACH_BACKBONE here, and its torch form.
#pragma once

#include "adabelief.h"
#include "adamw.h"
#include "radam.h"
#include "sgd.h"

namespace fused_adaptive {

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

FA_INLINE void prepare_backbone(int backbone, const Hyper& h, double t, Scalars<double>& r) {
  switch (backbone) {
#define FA_CASE(name)                                                     \
  case k##name:                                                           \
    name::prepare(h, t, name::kCorrects ? powers_of(h, t) : Powers{}, r); \
    break;
    FA_FOR_EACH_BACKBONE(FA_CASE)
#undef FA_CASE
  }
}

}  // namespace fused_adaptive
