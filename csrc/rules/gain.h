// Gains of whole tensors, and how the inner products of an interval change them. Shared by host and device.
#pragma once

#include "portable.h"

namespace fused_adaptive {

// The summation order of inner products does not depend on the device, the grid or the number of threads. Element e of
// a chunk is added to the float64 lane e mod kLanes, in ascending e. The kLanesOfThread adjacent lanes of a thread
// are added pairwise, then the sums of threads by halves, then the sums of chunks in groups of kGroup, in ascending
// order.
constexpr int64_t kChunk = 16384;
constexpr int kLanes = 1024;
constexpr int kLanesOfThread = 4;
constexpr int kGroup = 256;

FA_INLINE int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// num and sq of TrainableLR; Hypergradient uses num only.
struct Products {
  double num, sq;
};

// Calls add(value) for each value in ascending order. Eight values are loaded at a time, so only the additions depend
// on one another. Past the end the last value is loaded again.
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

// Returns the sum over one group of chunks of a tensor.
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

// Returns 1 + num/den, bounded to [3/4, 1 + c] [TLR, Eq. 9]; 3/4 if num or sq is not finite or den is not positive.
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

// Returns what is added to a gain: the step size times the sum of lr * <., .> over its tensors, divided by the square
// of the largest reference rate of their param groups. Not finite if that rate is 0.
FA_INLINE double ascent(double step_size, double slope, double lr_scale) {
  return step_size * slope / (lr_scale * lr_scale);
}

// Returns the gain plus the amount, at least 0 and within the bounds; the gain itself if the amount is not finite.
FA_INLINE double ascended(double gain, double amount, double lowest, double highest) {
  if (!is_finite(amount)) return gain;
  return bounded(gain + amount > 0 ? gain + amount : 0, lowest, highest);
}

}  // namespace fused_adaptive
