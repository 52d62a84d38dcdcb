// Accesses of a thread: as wide as 16 bytes where addresses allow it, and all on their way before one is waited for.
#pragma once

#include <cuda_runtime.h>

#include "tables.h"

#define FA_DEVICE __device__ __forceinline__

namespace fused_adaptive::cuda {

// Blocks that a multiprocessor has room for, which bounds the registers of a thread: 64, 80 or 128. What fills the
// memory's pipe is the bytes on their way, so threads that load more arrays, or more bytes of each, may be fewer.
// bytes: of an element of the parameter. is_active: ActiveLR's alone, where arrays' addresses are not kept.
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

// The addresses come from shared memory, where the compiler cannot see that they are those of global memory.
FA_DEVICE void assume_global(const void* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
#endif
}

// kCount neighbours at once. kOnce: nobody reads them again, so they need not push anything out of the caches.
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

// Where a thread's elements are in every array of a tensor: neighbours, all accessed at once...
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

// ...or one by one, in a row of the block's threads each, as far as there are elements left.
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
