// Helpers for code that is compiled as CPU loops, as CUDA kernels, and as emulated CUDA kernels with g++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Functions are always inlined, since they are compiled for several instruction sets. Of out-of-line copies the linker
// keeps one for all callers, and that could be the one for the widest instruction set.
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define FA_INLINE __host__ __device__ __forceinline__
#else
#define FA_INLINE inline __attribute__((always_inline))
#endif

namespace fused_adaptive {

// Storage types of bfloat16 and float16; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To, class From>
FA_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
#if defined(__CUDA_ARCH__)
  memcpy(&to, &from, sizeof(To));
#else
  __builtin_memcpy(&to, &from, sizeof(To));
#endif
  return to;
}

FA_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
FA_INLINE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

FA_INLINE float widen(float x) { return x; }
FA_INLINE double widen(double x) { return x; }
FA_INLINE float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FA_INLINE float widen(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // A product with 2^112 corrects the bias of the exponent, also exactly for subnormals. Infinity and NaN also need the
  // largest exponent.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | sign);
#endif
}

// Round to nearest, ties to even, as torch does.
FA_INLINE void narrow(float x, float& to) { to = x; }
FA_INLINE void narrow(double x, double& to) { to = x; }
FA_INLINE void narrow(float x, BFloat16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
FA_INLINE void narrow(float x, Half& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: the sum with 1/2 has its rounded bits in the last bits of the mantissa.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(half | sign);
#endif
}

// Type of the arithmetic and of the state of parameters of type P.
template <class P>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class P>
using Compute = typename ComputeOf<P>::type;

// Boolean that all elements of a tensor share. It is a bit mask, since a bool would be a branch that prevents
// vectorization of a loop.
template <class T>
struct Switch {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits mask;

  FA_INLINE Switch& operator=(bool on) {
    mask = on ? ~Bits(0) : Bits(0);
    return *this;
  }
  FA_INLINE operator bool() const { return mask != 0; }
  FA_INLINE T choose(T if_on, T if_off) const {
#if defined(__CUDA_ARCH__)
    return mask != 0 ? if_on : if_off;  // on a GPU a predicate is cheaper and takes no register
#endif
    return bit_cast<T>(static_cast<Bits>((bit_cast<Bits>(if_on) & mask) | (bit_cast<Bits>(if_off) & ~mask)));
  }
};

FA_INLINE bool is_finite(float x) { return (bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }
FA_INLINE bool is_finite(double x) { return (bit_cast<uint64_t>(x) & 0x7ff0000000000000ull) != 0x7ff0000000000000ull; }

}  // namespace fused_adaptive
