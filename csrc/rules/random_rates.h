// Random rates of ASLR, one per tensor and step. Tested against the torch definition in
// fused_adaptive/core/random_rates.py.
#pragma once

#include "philox.h"

namespace fused_adaptive {

// Inputs of the generator. They are on the device of the plan, so a captured graph draws new rates in each replay.
struct RandomRates {
  int64_t seed;
  int64_t step;           // number of optimizer steps applied so far
  double relative_width;  // s/c
};

// Returns the factor of the rate of a tensor [ASLR, Eq. 10]. index is its position over all param groups.
FA_INLINE double rate_factor(const RandomRates& random_rates, int64_t index) {
  uint32_t x[4] = {static_cast<uint32_t>(random_rates.step),
                   static_cast<uint32_t>(static_cast<uint64_t>(random_rates.step) >> 32), static_cast<uint32_t>(index),
                   0};
  philox(static_cast<uint64_t>(random_rates.seed), x);
  return 1 + random_rates.relative_width * ((x[0] >> 8) * 0x1p-24 - 0.5);
}

}  // namespace fused_adaptive
