// Backbones: they update the state with a gradient and return the direction u. This is the only native definition; the
// CPU loops and the CUDA kernels include it. It is tested against the torch definition: the interface in
// fused_adaptive/core/backbone.py and the backbones in fused_adaptive/optimizers/.
//
// A backbone is a struct with
//   kStates                      number of state arrays, in the order of STATE_NAMES in declarations.py
//   kIsLazy                      whether the first update creates the state
//   kStoresDirection             whether the last direction cannot be computed from the state and must be stored for
//                                Hypergradient
//   kCorrects                    whether prepare() needs powers
//   kKeepsProduct                whether it keeps mu_product
//   kFirstBase                   whose power is the first of Powers
//   prepare(hyper, progress, powers, r)  computes the scalars r of a step, in double
//   update(g, s, scalars)        updates the state s with the gradient g and returns u
//   direction(s, scalars)        returns the u of the current state
// A new backbone needs a header with the struct, its include and its line in FA_FOR_EACH_BACKBONE here, and its torch
// definition.
#pragma once

#include "adabelief.h"
#include "adamw.h"
#include "nadam.h"
#include "radam.h"
#include "sgd.h"

namespace fused_adaptive {

// Backbones with their structure, in the order of BackboneId.
#define FA_FOR_EACH_BACKBONE(X) \
  X(SgdPlain)                   \
  X(SgdMomentum)                \
  X(SgdNesterov)                \
  X(AdamWPlain)                 \
  X(AdamWAmsgrad)               \
  X(RAdamPlain)                 \
  X(NAdamPlain)                 \
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

// Properties of a backbone that code outside its loops needs.
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

FA_INLINE Powers powers_of(int backbone, const Hyper& h, double t) {
  switch (backbone) {
#define FA_CASE(name) \
  case k##name:       \
    return name::kCorrects ? powers_of<name>(h, t) : Powers{};
    FA_FOR_EACH_BACKBONE(FA_CASE)
#undef FA_CASE
  }
  return {};
}

FA_INLINE void prepare_backbone(int backbone, const Hyper& h, const Progress& now, Scalars<double>& r) {
  const Powers powers = powers_of(backbone, h, now.t);
  switch (backbone) {
#define FA_CASE(name)                 \
  case k##name:                       \
    name::prepare(h, now, powers, r); \
    break;
    FA_FOR_EACH_BACKBONE(FA_CASE)
#undef FA_CASE
  }
}

}  // namespace fused_adaptive
