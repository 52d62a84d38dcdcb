// Updates of the one-element state of a tensor (counts, sums of rates, gains) in a step and at the end of an interval.
// This is the only native definition: the CPU backend, the CUDA kernels and the CUDA host code call it, each with
// addresses that it can access.
#pragma once

#include "policy.h"

namespace fused_adaptive {

// A pointer is null if the tensor has no such number or the caller cannot access it.
struct Numbers {
  double *gain, *lr_sum, *lr_last;
  void *step, *mu_product;  // float or double
  int64_t *active_step, *active_applied, *tlr_step, *tlr_applied, *tlr_applied_prev, *direction_valid;
  int64_t* rounding_step;  // null: rounds to nearest
  bool step_is_double;
  bool product_is_float;  // mu_product is rounded to float32, also where a copy of it is a double

  FA_INLINE double step_count() const { return read(step, 0); }
  FA_INLINE void set_step(double count) const { write(step, count); }
  FA_INLINE void count_step() const { set_step(step_count() + 1); }
  FA_INLINE double product() const { return read(mu_product, 1); }
  // Returns mu_product after a step with this momentum.
  FA_INLINE double next_product(double mu) const {
    return product_is_float ? static_cast<double>(static_cast<float>(product()) * static_cast<float>(mu))
                            : product() * mu;
  }
  FA_INLINE void set_product(double product) const { write(mu_product, product); }
  FA_INLINE void count_rounding() const {
    if (rounding_step != nullptr) *rounding_step += 1;
  }

 private:
  FA_INLINE double read(const void* at, double otherwise) const {
    if (at == nullptr) return otherwise;
    return step_is_double ? *static_cast<const double*>(at) : static_cast<double>(*static_cast<const float*>(at));
  }
  FA_INLINE void write(void* at, double number) const {
    if (at == nullptr) return;
    if (step_is_double) {
      *static_cast<double*>(at) = number;
    } else {
      *static_cast<float*>(at) = static_cast<float>(number);
    }
  }
};

// Returns whether the running interval ends with its call number `calls`.
FA_INLINE bool ends_at(const Rule& rule, int64_t calls) { return rule.interval > 0 && calls >= rule.interval; }

// ---- ActiveLR ----

// What a step or an interval end does to the sums and element gains of a tensor.
struct ActiveEnd {
  bool fresh;    // the sum of gradients is still 0
  bool ends;     // the interval ends
  bool adjusts;  // the interval ends and the last step could move the tensor
};

// Returns the ActiveEnd of a step. applies: the tensor has a gradient.
FA_INLINE ActiveEnd end_in_step(const Rule& rule, const Numbers& n, bool applies, bool has_rate) {
  const bool fresh = *n.active_applied == 0;
  const bool ends = ends_at(rule, *n.active_step + 1) && (applies || !fresh);
  return {fresh, ends, ends && (applies ? has_rate : *n.active_applied > 0)};
}

// Returns the ActiveEnd of end_interval().
FA_INLINE ActiveEnd end_by_hand(const Numbers& n) {
  return {*n.active_applied == 0, *n.active_applied != 0, *n.active_applied > 0};
}

FA_INLINE void restart_active(const Numbers& n) { *n.active_step = *n.active_applied = 0; }

// The count of applied steps is negative if the last of them had no rate, since end_by_hand() needs this.
FA_INLINE void count_active(const Rule& rule, const Numbers& n, bool applied, bool has_rate) {
  if (ends_at(rule, *n.active_step + 1)) return restart_active(n);
  *n.active_step += 1;
  if (!applied) return;
  const int64_t steps = (*n.active_applied < 0 ? -*n.active_applied : *n.active_applied) + 1;
  *n.active_applied = has_rate ? steps : -steps;
}

// ---- TrainableLR and Hypergradient ----

// The current step of a tensor that is measured before its update, since its Numbers do not include that step yet.
struct Uncounted {
  bool applies;
  double lr;  // times ASLR's random rate
};

// Returns the number of steps of the running interval that were applied to the tensor.
FA_INLINE int64_t applied_steps(const Numbers& n, const Uncounted& uncounted) {
  return *n.tlr_applied + uncounted.applies;
}

FA_INLINE double lr_sum(const Numbers& n, const Uncounted& uncounted) {
  return uncounted.applies ? *n.lr_sum + uncounted.lr : *n.lr_sum;
}

// Returns whether the tensor could move in TrainableLR's interval: the sum of its rates is not 0 and, unless the source
// is the gradient, its gain is not 0.
FA_INLINE bool is_measurable(const Rule& rule, const Numbers& n, const Uncounted& uncounted) {
  return lr_sum(n, uncounted) != 0 && (rule.source == Source::gradient || *n.gain != 0);
}

// Returns whether Hypergradient measures the tensor: it has a gradient, a rate and a direction of the last step.
FA_INLINE bool has_slope(const Numbers& n, bool applies, bool has_rate) {
  return applies && has_rate && *n.direction_valid != 0;
}

// Returns whether the update adds the gradient to grad_mean_sum. It does not in the last step of an interval whose
// source is the gradient: the measurement before that update already includes the gradient.
FA_INLINE bool adds_mean(const Rule& rule, const Numbers& n) {
  return !(rule.source == Source::gradient && ends_at(rule, *n.tlr_step + 1));
}

// Measurement of one tensor, or the sum over all tensors that share a gain.
struct Outcome {
  Products products;
  double slope;  // lr * <., .>
  bool measured, restarts;
};

FA_INLINE Outcome outcome_of_slope(Products products, bool measured, double lr) {
  return {products, measured ? lr * products.num : 0, measured, false};
}

// Returns the outcome of TrainableLR's interval. The slope is lr * <sum G, sum G_prev> [TLR, D.4].
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

// Adds the outcome of one tensor to that of a global gain. Tensors are added in their order.
FA_INLINE void add_outcome(Outcome& unit, const Outcome& own) {
  if (!own.measured) return;
  unit.products.num += own.products.num;
  unit.products.sq += own.products.sq;
  unit.slope += own.slope;
  unit.measured = true;
}

// Adapts the gain of a tensor to the outcome of its unit. Sets own.restarts if the products are not finite, so the next
// interval has nothing to compare with.
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

// Counts a step after its update. If the source is the gradient, the interval was measured before the update and is
// restarted here. Other intervals are restarted after their measurement.
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
