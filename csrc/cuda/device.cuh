// What the kernels are made of: accesses as wide as 16 bytes, the last block, and what a step's flags mean.
#pragma once

#include <cuda_runtime.h>

#include "tables.h"

#define FA_DEVICE __device__ __forceinline__
#define FA_NOINLINE __attribute__((noinline))
#ifndef FA_SHARED  // the emulation of tests/cuda_emulation has its own
#define FA_SHARED(Type, name) __shared__ Type name
#endif

namespace fused_adaptive::cuda {

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

template <class E>
FA_DEVICE E* at(const Tensor& x, int role, int64_t element) {
  return static_cast<E*>(x.at[role]) + element;
}

// True in every thread of the block that is the last of all launches to arrive here; it sees what the others wrote.
FA_DEVICE bool is_last_block(const Launch& launch) {
  FA_SHARED(bool, last);
  __syncthreads();
  if (threadIdx.x == 0) {
    // After the barrier, so that it is for what the whole block has written, and by the thread that draws the ticket.
    __threadfence();
    last = atomicAdd(launch.ticket, 1u) == launch.blocks - 1;
    if (last) *launch.ticket = 0;  // for the next step
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The chunks of this block: neighbours, so that it changes tensors as rarely as possible.
FA_DEVICE int64_t first_chunk(const Launch& launch, int64_t block) { return launch.count * block / gridDim.x; }

// Calls body(i, chunk) for this block's chunks, and set_up(tensor) with the block at rest wherever another tensor
// begins.
template <class SetUp, class Body>
FA_DEVICE void for_chunks(const Launch& launch, const SetUp& set_up, const Body& body) {
  int current = -1;
  const int64_t end = first_chunk(launch, blockIdx.x + 1);
  for (int64_t i = first_chunk(launch, blockIdx.x); i < end; ++i) {
    const Chunk chunk = launch.chunks[i];
    if (chunk.tensor != current) {
      current = chunk.tensor;
      __syncthreads();  // nobody works on the last tensor any more
      set_up(current);
      __syncthreads();
    }
    body(i, chunk);
  }
}

// AMP: no state changes at all.
FA_DEVICE bool is_skipped(const Step& step) { return step.found_inf != nullptr && *step.found_inf != 0; }

FA_DEVICE Hyper hyper_of(const Step& step, int group) {
  Hyper hyper = step.far_hypers != nullptr ? step.far_hypers[group] : step.hypers[group];
  if (step.lrs != nullptr && step.lrs[group].at != nullptr) hyper.lr = step.lrs[group].value();
  return hyper;
}

// Out of line: ten rounds of the generator are much code, and only ASLR draws.
__device__ FA_NOINLINE inline double drawn_factor_of(const DrawTable* draw, int64_t index) {
  return drawn_factor(*draw, index);
}
FA_DEVICE double draw_of(const Step& step, const Tensor& x) {
  return step.draw != nullptr ? drawn_factor_of(step.draw, x.index) : 1.0;
}

FA_DEVICE const void* grad_of(const Step& step, int tensor) {
  return step.grads != nullptr ? step.grads[tensor] : nullptr;
}

// Whether the tensor can be accessed by 16 bytes: its state is where it was, its gradient may be anywhere.
FA_DEVICE bool is_wide(const Tensor& x, const void* grad) {
  return x.aligned && reinterpret_cast<uintptr_t>(grad) % 16 == 0;
}

FA_DEVICE double grad_factor_of(const Step& step, const Tensor& x) {
  const double factor = step.grad_scale.at != nullptr ? 1.0 / step.grad_scale.value() : 1.0;
  return x.maximize ? -factor : factor;
}

// A parameter's element, exact where it has a master.
template <class P>
FA_DEVICE Compute<P> weight_of(const Tensor&, P p, int16_t) {
  return widen(p);
}
FA_DEVICE float weight_of(const Tensor& x, BFloat16 p, int16_t low) {
  return x.at[kLow] != nullptr ? join(p, low) : widen(p);
}

// The other halves of kCount parameters, where they have one.
template <class P, int kCount>
FA_DEVICE void load_low(int16_t (&low)[kCount], const Tensor& x, int64_t element) {
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (x.at[kLow] != nullptr) load(low, at<int16_t>(x, kLow, element));
  }
}

// Weights become parameters, with their other halves, or rounded one way or the other.
template <class P, int kCount>
FA_DEVICE void store_weights(const Compute<P> (&weights)[kCount], const Tensor& x, uint32_t rounding_step,
                             int64_t element) {
  P p[kCount];
  bool is_done = false;
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (x.at[kLow] != nullptr) {
      int16_t low[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) split(weights[i], p[i], low[i]);
      store(low, at<int16_t>(x, kLow, element));
      is_done = true;
    } else if (x.numbers.rounding_step != nullptr) {
      static_assert(kCount == 1 || kCount == kNoiseBlock, "one block of random numbers");
      const Noise noise = {static_cast<uint64_t>(x.seed), rounding_step, static_cast<uint32_t>(x.index)};
      uint32_t words[4];
      random_words(noise, element / kNoiseBlock, words);
      const int first = static_cast<int>(element % kNoiseBlock);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const uint32_t random = kCount == 1 ? bits_of_one(words, first) : random_bits(words, i);
        round_stochastically(weights[i], random, p[i]);
      }
      is_done = true;
    }
  }
  if (!is_done) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) narrow(weights[i], p[i]);
  }
  store(p, at<P>(x, kParam, element));
}

// The backbone's scalars, kept while neighbouring tensors have the same: powers in double take a while.
struct BackboneScalars {
  Scalars<double> scalars;
  double t;
  int group;
};

template <class Backbone>
FA_DEVICE Scalars<double>& backbone_scalars(BackboneScalars& cache, const Hyper& hyper, int group, double t) {
  if (cache.group != group || cache.t != t) {
    cache.scalars = Scalars<double>{};
    Backbone::prepare(hyper, t, cache.scalars);
    cache.group = group;
    cache.t = t;
  }
  return cache.scalars;
}

}  // namespace fused_adaptive::cuda
