// Memory accesses of a thread: up to 16 bytes wide if addresses are aligned. All loads are issued before the first one
// is used.
#pragma once

#include <cuda_runtime.h>

#include "tables.h"

#define FA_DEVICE __device__ __forceinline__

namespace fused_adaptive::cuda {

// Blocks per multiprocessor. The number limits the registers of a thread to 64, 80 or 128. Bandwidth depends on the
// bytes in flight, so fewer threads suffice if each loads more arrays or more bytes of each array.
// bytes: size of an element of the parameter. is_active: the mode is kScalesElements, in which addresses of arrays take
// no registers.
constexpr int blocks_at_once(int bytes, int arrays, bool is_active) {
  const bool few = arrays <= 6;
  if (bytes == 4) return few ? 4 : 3;
  return bytes == 2 && (arrays <= 4 || (few && is_active)) ? 3 : 2;
}

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<1> {
  using type = unsigned char;
};

// Addresses are read from shared memory, so the compiler does not know that they are in global memory.
FA_DEVICE void assume_global(const void* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
#endif
}

// Loads kCount adjacent elements. kOnce: they are not read again, so they should not evict other data from the caches.
template <bool kOnce = false, class E, int kCount>
FA_DEVICE void load(E (&to)[kCount], const void* from) {
  constexpr int kBytes = kCount * sizeof(E), kWord = kBytes < 16 ? kBytes : 16;
  using Word = typename WordOf<kWord>::type;
  Word words[kBytes / kWord];
  assume_global(from);
#pragma unroll
  for (int i = 0; i < kBytes / kWord; ++i) {
    const Word* word = static_cast<const Word*>(from) + i;
    words[i] = kOnce ? __ldcs(word) : *word;
  }
  memcpy(to, words, kBytes);
}

template <class E, int kCount>
FA_DEVICE void store(const E (&from)[kCount], void* to) {
  constexpr int kBytes = kCount * sizeof(E), kWord = kBytes < 16 ? kBytes : 16;
  using Word = typename WordOf<kWord>::type;
  Word words[kBytes / kWord];
  memcpy(words, from, kBytes);
  assume_global(to);
#pragma unroll
  for (int i = 0; i < kBytes / kWord; ++i) static_cast<Word*>(to)[i] = words[i];
}

template <class E, int kCount>
FA_DEVICE void fill(E (&to)[kCount], E value) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = value;
}

// Elements of a thread in every array of a tensor: adjacent elements, accessed at once.
template <int kElements>
struct Neighbours {
  static constexpr int kCount = kElements;
  static constexpr bool kAtOnce = true;
  int64_t first;

  FA_DEVICE int64_t element(int i) const { return first + i; }
  template <bool kOnce = false, class E>
  FA_DEVICE void load(E (&to)[kCount], const E* array) const {
    cuda::load<kOnce>(to, array + first);
  }
  template <class E>
  FA_DEVICE void store(const E (&from)[kCount], E* array) const {
    cuda::store(from, array + first);
  }
};

// Elements of a thread in every array of a tensor: every kThreads-th element, accessed one by one, up to `left`.
template <int kElements>
struct Column {
  static constexpr int kCount = kElements;
  static constexpr bool kAtOnce = false;
  int64_t first;
  int left;

  FA_DEVICE bool has(int i) const { return i * kThreads < left; }
  FA_DEVICE int64_t element(int i) const { return first + i * kThreads; }
  template <bool kOnce = false, class E>
  FA_DEVICE void load(E (&to)[kCount], const E* array) const {
    fill(to, E{});
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (has(i)) cuda::load<kOnce>(reinterpret_cast<E(&)[1]>(to[i]), array + element(i));
    }
  }
  template <class E>
  FA_DEVICE void store(const E (&from)[kCount], E* array) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (has(i)) cuda::store(reinterpret_cast<const E(&)[1]>(from[i]), array + element(i));
    }
  }
};

}  // namespace fused_adaptive::cuda
