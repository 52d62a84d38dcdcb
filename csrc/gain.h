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

// The sum over the chunks of one tensor, or over one group of them at a time.
FA_INLINE Products sum_group(const Products* partials, int64_t count) {
  Products sum = {0, 0};
  for (int64_t i = 0; i < count; ++i) {
    sum.num += partials[i].num;
    sum.sq += partials[i].sq;
  }
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

// Eq. 9 of [TLR]: 1 + num/den, within [3/4, 5/4]; 3/4 where they are not finite or the curvature is negative.
FA_INLINE double newton_factor(Products products) {
  const double max_growth = 0.25, shrink = 0.75;
  if (!is_finite(products.num) || !is_finite(products.sq)) return shrink;
  if (products.num == 0) return 1;
  const double curvature = 4 * (products.sq - products.num), bound = products.num / max_growth;
  const double den = curvature > bound ? curvature : bound;
  if (den <= 0) return shrink;
  const double factor = 1 + products.num / den;
  return factor < shrink ? shrink : (factor > 1 + max_growth ? 1 + max_growth : factor);
}

// The gain is never negative, and stays where the amount is not finite.
FA_INLINE double ascended(double gain, double amount) {
  if (!is_finite(amount)) return gain;
  return gain + amount > 0 ? gain + amount : 0;
}

}  // namespace fused_adaptive
