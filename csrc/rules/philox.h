// Counter-based random number generator of stochastic rounding and of ASLR's random rates. It has no state and gives
// the same numbers on every backend. Tested against the torch definition in fused_adaptive/core/philox.py.
#pragma once

#include "portable.h"

namespace fused_adaptive {

// Philox4x32-10 [Salmon et al., SC 2011]: replaces the counter x by four random words.
FA_INLINE void philox(uint64_t key, uint32_t (&x)[4]) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(x[0]) * 0xD2511F53u, p1 = static_cast<uint64_t>(x[2]) * 0xCD9E8D57u;
    const uint32_t x0 = static_cast<uint32_t>(p1 >> 32) ^ x[1] ^ key0;
    const uint32_t x2 = static_cast<uint32_t>(p0 >> 32) ^ x[3] ^ key1;
    x[1] = static_cast<uint32_t>(p1);
    x[3] = static_cast<uint32_t>(p0);
    x[0] = x0;
    x[2] = x2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace fused_adaptive
