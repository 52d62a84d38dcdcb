// Functions that translated PTX uses. Threads, barriers and shared memory are those of tests/cuda_emulation.
#pragma once

// Few includes: there are hundreds of files with one kernel each, and headers would take most of their compile time.
#include <cstdint>
#include <type_traits>

namespace ptx {

unsigned thread(), threads(), block(), blocks();  // the special registers
void barrier();
void warp_barrier();

// Registers a kernel by name when its library is loaded.
struct Kernel {
  using Entry = void (*)(char* shared, unsigned shared_size, char* const* arguments);
  const char* name;
  Entry entry;
  unsigned shared;  // apart from those that the launch sets
  Kernel(const char* name, Entry entry, unsigned shared);
};

// Ends the launch, which throws this message.
[[noreturn]] void fault(const char* what, const char* instruction);

// Values of the 32 threads of a warp.
void show(uint64_t mine);
uint64_t shown_by(unsigned lane);

}  // namespace ptx

// Both declare `at`.
#define AT(address, size, text)            \
  const uint64_t at = (uint64_t)(address); \
  if (at & ((size) - 1)) ptx::fault("misaligned address", text);
#define SHARED(offset, size, text)                                                                 \
  const uint64_t inside = (offset);                                                                \
  if (inside & ((size) - 1)) ptx::fault("misaligned address", text);                               \
  if (inside + (size) > shared_size) ptx::fault("an address outside of the block's memory", text); \
  const uint64_t at = (uint64_t)shared + inside;

namespace {

inline int32_t wide(int16_t x) { return x; }
inline uint32_t wide(uint16_t x) { return x; }
inline int64_t wide(int32_t x) { return x; }
inline uint64_t wide(uint32_t x) { return x; }

inline int32_t high_product(int32_t a, int32_t b) { return (int64_t{a} * b) >> 32; }
inline uint32_t high_product(uint32_t a, uint32_t b) { return (uint64_t{a} * b) >> 32; }
inline int64_t high_product(int64_t a, int64_t b) { return (__int128{a} * b) >> 64; }
inline uint64_t high_product(uint64_t a, uint64_t b) { return ((unsigned __int128){a} * b) >> 64; }

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline double truncated(double x) { return __builtin_trunc(x); }
inline double rounded(double x) { return __builtin_nearbyint(x); }
template <class T>
bool is_nan(T x) {
  return x != x;
}

// A device computes the upper half from the upper half of x.
inline double approximate_reciprocal(double x) {
  const auto upper = [](double y) {
    return __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, y) & 0xFFFFFFFF00000000u);
  };
  return upper(1 / upper(x));
}

// Floats: NaN is ignored, and -0 is smaller than 0.
template <class T>
T smaller(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (a == b) return __builtin_signbit(a) ? a : b;
    return b < a ? b : a;
  }
  return b < a ? b : a;
}
template <class T>
T larger(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (a == b) return __builtin_signbit(a) ? b : a;
    return b > a ? b : a;
  }
  return b > a ? b : a;
}
inline float magnitude(float x) { return __builtin_fabsf(x); }
inline double magnitude(double x) { return __builtin_fabs(x); }
template <class T>
T magnitude(T x) {
  return x < 0 ? -x : x;
}

inline bool inverted(bool x) { return !x; }
template <class T>
T inverted(T x) {
  return ~x;
}
// A shift by the number of bits or more leaves no bits of x.
template <class T>
T shifted_left(T x, uint32_t n) {
  return n >= 8 * sizeof(T) ? 0 : x << n;
}
template <class T>
T shifted_right(T x, uint32_t n) {
  return n >= 8 * sizeof(T) ? (x < 0 ? -1 : 0) : x >> n;
}
template <class T>
T bit_field(T x, uint32_t first, uint32_t count) {
  const uint32_t bits = 8 * sizeof(T);
  first &= 255;
  count &= 255;
  if (count == 0 || first >= bits) return count != 0 && x < 0 ? -1 : 0;
  if (first + count > bits) count = bits - first;  // the rest is filled with the sign or with zeros
  return T(std::make_unsigned_t<T>(x) << (bits - first - count)) >> (bits - count);
}
// Bytes of b, a by the digits of the selector. With 8 added, all bits are the highest bit of the byte.
inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t from = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> (4 * i);
    const auto byte = static_cast<uint8_t>(from >> (8 * (digit & 7)));
    result |= uint32_t(digit & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * i);
  }
  return result;
}

// Larger values become the largest; NaN becomes 0.
template <class I>
I to_integer(double x) {
  x = __builtin_trunc(x);
  const double end = __builtin_ldexp(1.0, 8 * sizeof(I) - std::is_signed_v<I>);
  if (x != x) return 0;
  if (x >= end) return ~I{0} ^ (std::is_signed_v<I> ? I(I{1} << (8 * sizeof(I) - 1)) : I{0});
  if (x < (std::is_signed_v<I> ? -end : 0.0)) return std::is_signed_v<I> ? I(I{1} << (8 * sizeof(I) - 1)) : I{0};
  return I(x);
}

inline float from_half(uint16_t h) {
  const int exponent = h >> 10 & 31;
  const double fraction = (h & 1023) / 1024.0;
  double x = exponent == 31  ? ((h & 1023) != 0 ? __builtin_nan("") : __builtin_inf())
             : exponent == 0 ? __builtin_ldexp(fraction, -14)
                             : __builtin_ldexp(1 + fraction, exponent - 15);
  return h & 0x8000 ? -x : x;
}
// Rounds to nearest even.
inline uint16_t to_half(float x) {
  const uint16_t sign = __builtin_signbit(x) ? 0x8000 : 0;
  const double size = __builtin_fabs(x);
  if (x != x) return 0x7FFF;
  if (size >= 65520) return sign | 0x7C00;
  int exponent;
  __builtin_frexp(size, &exponent);
  const int unit = size < 0x1p-14 ? -24 : exponent - 11;  // of the last bit
  const auto units = static_cast<uint32_t>(__builtin_nearbyint(__builtin_ldexp(size, -unit)));
  return sign | (((unit + 24) << 10) + units);
}

// For all threads of the warp. Segments are not supported.
inline void check_members(uint32_t members) {
  if (members != 0xFFFFFFFF) ptx::fault("a part of a warp", "shfl or redux");
}
template <class T>
T shuffled(T mine, uint32_t lane, uint32_t members) {
  check_members(members);
  ptx::show(mine);
  ptx::warp_barrier();
  const auto found = static_cast<T>(ptx::shown_by(lane));
  ptx::warp_barrier();  // all threads read this value before the next is written
  return found;
}
template <class T>
T largest_of_warp(T mine, uint32_t members) {
  check_members(members);
  ptx::show(mine);
  ptx::warp_barrier();
  T found = mine;
  for (unsigned lane = 0; lane < 32; ++lane) found = larger(found, static_cast<T>(ptx::shown_by(lane)));
  ptx::warp_barrier();
  return found;
}

}  // namespace
