// Conversion between the float32 weights of a step and bfloat16 parameters: masters in two halves, and stochastic
// rounding. Tested against the torch definition in fused_adaptive/core/masters.py.
#pragma once

#include "philox.h"

namespace fused_adaptive {

// The parameter is the upper half of its float32 weight, rounded half away from zero, and low is the remainder. As
// integers, (parameter << 16) + low are the bits of the weight.
FA_INLINE float join(BFloat16 high, int16_t low) {
  const uint32_t upper = static_cast<uint32_t>(high.bits) << 16;
  return bit_cast<float>(upper + static_cast<uint32_t>(static_cast<int32_t>(low)));
}
FA_INLINE void split(float weight, BFloat16& high, int16_t& low) {
  uint32_t bits = bit_cast<uint32_t>(weight);
  bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;  // other NaNs could round to a number
  high.bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  low = static_cast<int16_t>(static_cast<uint16_t>(bits));
}

// Key and counter of the random bits with which the elements of a tensor are rounded in one step.
struct Noise {
  uint64_t seed;
  uint32_t step;   // number of steps that the tensor has taken
  uint32_t index;  // position of the parameter over all param groups
};
constexpr int kNoiseBlock = 8;  // elements per call of the generator, 16 bits each

// Computes the random numbers of one block of elements. The last word of the counter differs from that of ASLR's random
// rates, so equal seeds give different numbers.
FA_INLINE void random_words(const Noise& noise, int64_t block, uint32_t (&x)[4]) {
  x[0] = static_cast<uint32_t>(block);
  x[1] = noise.step;
  x[2] = noise.index;
  x[3] = 0x80000000u | static_cast<uint32_t>(block >> 32);
  philox(noise.seed, x);
}
// Returns the random bits of element i of a block, in [0, 2^16).
FA_INLINE uint32_t random_bits(const uint32_t (&words)[4], int i) { return (words[i / 2] >> (16 * (i % 2))) & 0xffffu; }

// Same as random_bits() for an i that is not known at compile time, since a GPU cannot index registers.
FA_INLINE uint32_t bits_of_one(const uint32_t (&words)[4], int i) {
  const uint32_t pair = i < 4 ? (i < 2 ? words[0] : words[1]) : (i < 6 ? words[2] : words[3]);
  return (pair >> (16 * (i % 2))) & 0xffffu;
}

// Rounds up with a probability proportional to the bits that are cut off. Infinity and NaN are kept.
FA_INLINE void round_stochastically(float x, uint32_t random, BFloat16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  BFloat16 nearest;
  narrow(x, nearest);
  to.bits = (bits & 0x7f800000u) == 0x7f800000u ? nearest.bits : static_cast<uint16_t>((bits + random) >> 16);
}

}  // namespace fused_adaptive
