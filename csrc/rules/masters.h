// What is between a step's float and a bfloat16 parameter that has more to it: the float32 master in two halves, and
// stochastic rounding. The torch definition, which is its oracle, is fused_adaptive/core/masters.py.
#pragma once

#include "philox.h"

namespace fused_adaptive {

// The parameter is the upper half of its weight, rounded half away from zero, low the remainder: as integers,
// (parameter << 16) + low are the weight's bits.
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

// Which random bits a tensor's elements are rounded with in one step.
struct Noise {
  uint64_t seed;
  uint32_t step;   // steps that the tensor has taken
  uint32_t index;  // its position over all param groups
};
constexpr int kNoiseBlock = 8;  // elements that share one call of the generator, 16 bits each

// The random numbers of one block of elements. The last word is one that ASLR's draws never have.
FA_INLINE void random_words(const Noise& noise, int64_t block, uint32_t (&x)[4]) {
  x[0] = static_cast<uint32_t>(block);
  x[1] = noise.step;
  x[2] = noise.index;
  x[3] = 0x80000000u | static_cast<uint32_t>(block >> 32);
  philox(noise.seed, x);
}
// The bits of a block's element i, in [0, 2^16).
FA_INLINE uint32_t random_bits(const uint32_t (&words)[4], int i) { return (words[i / 2] >> (16 * (i % 2))) & 0xffffu; }

// The same without an index into registers, which a GPU does not have.
FA_INLINE uint32_t bits_of_one(const uint32_t (&words)[4], int i) {
  const uint32_t pair = i < 4 ? (i < 2 ? words[0] : words[1]) : (i < 6 ? words[2] : words[3]);
  return (pair >> (16 * (i % 2))) & 0xffffu;
}

// Up with the probability of what is cut off. What is not finite is kept.
FA_INLINE void round_stochastically(float x, uint32_t random, BFloat16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  BFloat16 nearest;
  narrow(x, nearest);
  to.bits = (bits & 0x7f800000u) == 0x7f800000u ? nearest.bits : static_cast<uint16_t>((bits + random) >> 16);
}

}  // namespace fused_adaptive
