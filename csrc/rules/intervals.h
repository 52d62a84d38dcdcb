// What a step and an interval's end do to the numbers that a tensor has one of: counts, sums of rates, gains. The one
// native definition: the CPU, the CUDA kernels and the host beside them call it, each with the addresses that it can
// reach.
#pragma once

#include "policy.h"

namespace fused_adaptive {

// Null where a tensor has no such number, or where the caller cannot reach it.
struct Numbers {
  double *gain, *lr_sum, *lr_last;
  void* step;  // float, or double
  int64_t *active_step, *active_applied, *tlr_step, *tlr_applied, *tlr_applied_prev, *direction_valid;
  int64_t* rounding_step;  // null: it is rounded to nearest
  bool step_is_double;

  FA_INLINE double step_count() const {
    if (step == nullptr) return 0;
    return step_is_double ? *static_cast<double*>(step) : static_cast<double>(*static_cast<float*>(step));
  }
  FA_INLINE void count_step() const {
    if (step == nullptr) return;
    if (step_is_double) {
      *static_cast<double*>(step) += 1;
    } else {
      *static_cast<float*>(step) += 1;
    }
  }
  FA_INLINE void count_rounding() const {
    if (rounding_step != nullptr) *rounding_step += 1;
  }
};

// Whether the call that makes it `calls` in the running interval ends it.
FA_INLINE bool ends_at(const Rule& rule, int64_t calls) { return rule.interval > 0 && calls >= rule.interval; }

// ---- ActiveLR ----

// What becomes of a tensor's sums and gains.
struct ActiveEnd {
  bool fresh;    // its sum of gradients is still 0
  bool ends;     // its interval ends
  bool adjusts;  // and the last step could move the tensor
};

// In a step. applies: the tensor takes part.
FA_INLINE ActiveEnd end_in_step(const Rule& rule, const Numbers& n, bool applies, bool has_rate) {
  const bool fresh = *n.active_applied == 0;
  const bool ends = ends_at(rule, *n.active_step + 1) && (applies || !fresh);
  return {fresh, ends, ends && (applies ? has_rate : *n.active_applied > 0)};
}

// Outside of one.
FA_INLINE ActiveEnd end_by_hand(const Numbers& n) {
  return {*n.active_applied == 0, *n.active_applied != 0, *n.active_applied > 0};
}

FA_INLINE void restart_active(const Numbers& n) { *n.active_step = *n.active_applied = 0; }

// The count of applied steps is negative if the last of them had no rate, since intervals that end by hand have to
// know.
FA_INLINE void count_active(const Rule& rule, const Numbers& n, bool applied, bool has_rate) {
  if (ends_at(rule, *n.active_step + 1)) return restart_active(n);
  *n.active_step += 1;
  if (!applied) return;
  const int64_t steps = (*n.active_applied < 0 ? -*n.active_applied : *n.active_applied) + 1;
  *n.active_applied = has_rate ? steps : -steps;
}

// ---- TrainableLR and Hypergradient ----

// What of the step under way is not in the numbers yet: a tensor that is measured before its update is not counted.
struct Uncounted {
  bool applies;
  double lr;  // with ASLR's draw
};

// Steps of the running interval that were applied to the tensor.
FA_INLINE int64_t applied_steps(const Numbers& n, const Uncounted& uncounted) {
  return *n.tlr_applied + uncounted.applies;
}

FA_INLINE double lr_sum(const Numbers& n, const Uncounted& uncounted) {
  return uncounted.applies ? *n.lr_sum + uncounted.lr : *n.lr_sum;
}

// Whether the tensor could move in TrainableLR's interval; by measured directions, also by its gain.
FA_INLINE bool is_measurable(const Rule& rule, const Numbers& n, const Uncounted& uncounted) {
  return lr_sum(n, uncounted) != 0 && (rule.source == Source::gradient || *n.gain != 0);
}

// Hypergradient measures a tensor that takes part, has a rate and has a direction.
FA_INLINE bool has_slope(const Numbers& n, bool applies, bool has_rate) {
  return applies && has_rate && *n.direction_valid != 0;
}

// Whether the step's gradient goes into the interval's sum: the mean is taken before the interval's last update, with
// that step's gradient in it.
FA_INLINE bool adds_mean(const Rule& rule, const Numbers& n) {
  return !(rule.source == Source::gradient && ends_at(rule, *n.tlr_step + 1));
}

// What was measured of one tensor, or of all tensors under a gain.
struct Outcome {
  Products products;
  double slope;  // lr * <., .>
  bool measured, restarts;
};

FA_INLINE Outcome outcome_of_slope(Products products, bool measured, double lr) {
  return {products, measured ? lr * products.num : 0, measured, false};
}

// Of TrainableLR's interval. The slope is lr * <sum G, sum G_prev> [TLR, D.4].
FA_INLINE Outcome outcome_of_interval(const Rule& rule, const Numbers& n, Products products, const Uncounted& uncounted,
                                      double lr) {
  Outcome own = {products, 0, is_measurable(rule, n, uncounted), false};
  if (!rule.has_eta || !own.measured) return own;
  const int64_t applied = applied_steps(n, uncounted);
  const double steps = static_cast<double>(applied) * static_cast<double>(*n.tlr_applied_prev);
  *n.tlr_applied_prev = applied;
  own.slope = lr * (products.num * steps);
  own.restarts = !(is_finite(products.num) && is_finite(products.sq));
  return own;
}

// The sums over the tensors of a global gain, in their order.
FA_INLINE void add_outcome(Outcome& unit, const Outcome& own) {
  if (!own.measured) return;
  unit.products.num += own.products.num;
  unit.products.sq += own.products.sq;
  unit.slope += own.slope;
  unit.measured = true;
}

// A tensor's gain, by what was measured under it. Sets own.restarts where the next interval has nothing to compare
// with.
FA_INLINE void adapt_gain(const Rule& rule, const Outcome& unit, double lr_scale, double& gain, Outcome& own) {
  if (rule.kind == PolicyKind::hypergradient) {
    gain = ascended(gain, ascent(rule.hyper_lr, unit.slope, lr_scale), rule.lowest, rule.highest);
  } else if (unit.measured && rule.has_eta) {
    gain = ascended(gain, ascent(rule.eta, unit.slope, lr_scale), rule.lowest, rule.highest);
  } else if (unit.measured) {
    gain = bounded(gain * newton_factor(unit.products, rule.c), rule.lowest, rule.highest);
    own.restarts = own.measured && !(is_finite(unit.products.num) && is_finite(unit.products.sq));
  }
}

FA_INLINE void restart_trainable(const Numbers& n) {
  *n.tlr_step = *n.tlr_applied = 0;
  if (n.lr_sum != nullptr) *n.lr_sum = 0;
}

// After the update. An interval that is measured before it is over; others are ended by who measures them.
FA_INLINE void count_scalar(const Rule& rule, const Numbers& n, bool applied, double lr, double rate_factor) {
  if (rule.kind == PolicyKind::hypergradient) {
    if (applied) *n.direction_valid = 1;
    return;
  }
  if (rule.has_eta && n.lr_last != nullptr) *n.lr_last = lr;
  if (rule.source == Source::gradient && ends_at(rule, *n.tlr_step + 1)) return restart_trainable(n);
  *n.tlr_step += 1;
  if (!applied) return;
  *n.tlr_applied += 1;
  if (n.lr_sum != nullptr) *n.lr_sum += lr * rate_factor;
}

}  // namespace fused_adaptive
