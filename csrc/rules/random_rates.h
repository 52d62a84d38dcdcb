// ASLR's draws: in each step one rate a tensor. fused_adaptive/core/random_rates.py has the torch definition.
#pragma once

#include "philox.h"

namespace fused_adaptive {

// What a step draws from, on the plan's device: so a captured graph draws anew in each replay.
struct RandomRates {
  int64_t seed;
  int64_t step;           // applied steps of the optimizer before this one
  double relative_width;  // s/c
};

// What the rate of the tensor at this position over all param groups is multiplied by [ASLR, Eq. 10].
FA_INLINE double rate_factor(const RandomRates& random_rates, int64_t index) {
  uint32_t x[4] = {static_cast<uint32_t>(random_rates.step),
                   static_cast<uint32_t>(static_cast<uint64_t>(random_rates.step) >> 32), static_cast<uint32_t>(index),
                   0};
  philox(static_cast<uint64_t>(random_rates.seed), x);
  return 1 + random_rates.relative_width * ((x[0] >> 8) * 0x1p-24 - 0.5);
}

}  // namespace fused_adaptive
