// The gains of whole tensors: what an interval's inner products do to them. Shared by host and device.
#pragma once

#include "portable.h"

namespace fused_adaptive {

// Inner products are summed in this order, whatever the device, grid or number of threads: element e of a chunk goes to
// the float64 sum e mod kLanes, in ascending e; a thread's kLanesOfThread neighbouring sums are added pairwise, then
// the threads' by halves; then the chunks, in groups of kGroup, in ascending order.
constexpr int64_t kChunk = 16384;
constexpr int kLanes = 1024;
constexpr int kLanesOfThread = 4;
constexpr int kGroup = 256;

FA_INLINE int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// num and sq of TrainableLR; Hypergradient uses the first alone.
struct Products {
  double num, sq;
};

// Calls add(value) for each of them, in ascending order. Eight are loaded at a time, so that only the additions wait
// for one another; past the end the last one is loaded again.
template <class E, class Add>
FA_INLINE void add_in_order(const E* values, int64_t count, const Add& add) {
  constexpr int kAhead = 8;
  for (int64_t begin = 0; begin < count; begin += kAhead) {
    E ahead[kAhead];
    for (int k = 0; k < kAhead; ++k) ahead[k] = values[begin + k < count ? begin + k : count - 1];
    for (int k = 0; k < kAhead; ++k) {
      if (begin + k < count) add(ahead[k]);
    }
  }
}

// The sum over the chunks of one tensor, or over one group of them at a time.
FA_INLINE Products sum_group(const Products* partials, int64_t count) {
  Products sum = {0, 0};
  add_in_order(partials, count, [&](const Products& one) {
    sum.num += one.num;
    sum.sq += one.sq;
  });
  return sum;
}

FA_INLINE Products sum_chunks(const Products* partials, int64_t count) {
  Products sum = {0, 0};
  for (int64_t begin = 0; begin < count; begin += kGroup) {
    const Products group = sum_group(partials + begin, count - begin < kGroup ? count - begin : kGroup);
    sum.num += group.num;
    sum.sq += group.sq;
  }
  return sum;
}

// Eq. 9 of [TLR]: 1 + num/den, within [3/4, 1 + c]; 3/4 where they are not finite or the curvature is negative.
FA_INLINE double newton_factor(Products products, double c) {
  const double shrink = 0.75;
  if (!is_finite(products.num) || !is_finite(products.sq)) return shrink;
  if (products.num == 0) return 1;
  const double curvature = 4 * (products.sq - products.num), bound = products.num / c;
  const double den = curvature > bound ? curvature : bound;
  if (den <= 0) return shrink;
  const double factor = 1 + products.num / den;
  return factor < shrink ? shrink : (factor > 1 + c ? 1 + c : factor);
}

FA_INLINE double bounded(double gain, double lowest, double highest) {
  return gain < lowest ? lowest : (gain > highest ? highest : gain);
}

// What a gain moves by: the step size times the sum of lr * <., .> over its tensors, by the square of the largest
// reference rate of their groups. Not finite where there is no such rate.
FA_INLINE double ascent(double step_size, double slope, double lr_scale) {
  return step_size * slope / (lr_scale * lr_scale);
}

// The gain is never negative, and stays where the amount is not finite.
FA_INLINE double ascended(double gain, double amount, double lowest, double highest) {
  if (!is_finite(amount)) return gain;
  return bounded(gain + amount > 0 ? gain + amount : 0, lowest, highest);
}

}  // namespace fused_adaptive
