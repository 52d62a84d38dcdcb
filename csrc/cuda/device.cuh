// Device functions that kernels share: assignment of chunks to blocks, the last block, arguments of a step, weights and
// counts of tensors.
#pragma once

#include "access.cuh"

#define FA_NOINLINE __attribute__((noinline))
#ifndef FA_SHARED  // tests/cuda_emulation defines its own
#define FA_SHARED(Type, name) __shared__ Type name
#endif

namespace fused_adaptive::cuda {

template <class E>
FA_DEVICE E* at(const Tensor& x, int role, int64_t element = 0) {
  return static_cast<E*>(x.at[role]) + element;
}

// Returns true in all threads of one block: the last one of all launches that calls this. Writes of the other blocks
// are visible to it.
FA_DEVICE bool is_last_block(const Launch& launch) {
  FA_SHARED(bool, last);
  __syncthreads();
  if (threadIdx.x == 0) {
    // The fence is after the barrier, so it covers the writes of the whole block, and in the thread that increments the
    // count.
    __threadfence();
    last = atomicAdd(launch.finished_blocks, 1u) == launch.blocks - 1;
    if (last) *launch.finished_blocks = 0;  // for the next step
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Returns the chunk that this block takes next.
FA_DEVICE int64_t next_turn(const Turns& turns) {
  FA_SHARED(unsigned, drawn);
  __syncthreads();  // all threads have read the last value of `drawn`
  // The first gridDim chunks need no ticket. Each block draws tickets until there is no chunk left, so the number of
  // tickets is the number of chunks, and atomicInc() resets the counter to 0 with the last ticket.
  if (threadIdx.x == 0) drawn = atomicInc(turns.tickets, static_cast<unsigned>(turns.count - 1));
  __syncthreads();
  return int64_t{gridDim.x} + drawn;
}

// Calls body(i) for each chunk of this block.
template <class Body>
FA_DEVICE void for_turns(const Turns& turns, const Body& body) {
  for (int64_t i = blockIdx.x; i < turns.count; i = next_turn(turns)) body(i);
}

// Calls body(i, chunk) for each chunk of this block, and set_up(tensor) between two barriers before the first chunk of
// another tensor.
template <class SetUp, class Body>
FA_DEVICE void for_chunks(const Launch& launch, const SetUp& set_up, const Body& body) {
  int current = -1;
  for_turns(launch.turns, [&](int64_t i) {
    const Chunk chunk = launch.chunks[i];
    if (chunk.tensor != current) {
      current = chunk.tensor;
      __syncthreads();  // all threads have finished the last tensor
      set_up(current);
      __syncthreads();
    }
    body(i, chunk);
  });
}

// Returns whether AMP skips the step. A skipped step changes no state.
FA_DEVICE bool is_skipped(const Step& step) { return step.found_inf != nullptr && *step.found_inf != 0; }

FA_DEVICE Hyper hyper_of(const Step& step, int group) {
  Hyper hyper = step.far_hypers != nullptr ? step.far_hypers[group] : step.hypers[group];
  if (step.lrs != nullptr && step.lrs[group].at != nullptr) hyper.lr = step.lrs[group].value();
  return hyper;
}

// Not inlined, to save registers: only ASLR needs it.
__device__ FA_NOINLINE inline double rate_factor_at(const RandomRates* random_rates, int64_t index) {
  return rate_factor(*random_rates, index);
}
FA_DEVICE double rate_factor_of(const Step& step, const Tensor& x) {
  return step.random_rates != nullptr ? rate_factor_at(step.random_rates, x.index) : 1.0;
}

FA_DEVICE const void* grad_of(const Step& step, int tensor) {
  return step.grads != nullptr ? step.grads[tensor] : nullptr;
}

// Returns whether accesses can be 16 bytes wide. The address of the gradient can change in each step, other addresses
// are fixed.
FA_DEVICE bool is_wide(const Tensor& x, const void* grad) {
  return x.aligned && reinterpret_cast<uintptr_t>(grad) % 16 == 0;
}

FA_DEVICE double grad_factor_of(const Step& step, const Tensor& x) {
  const double factor = step.grad_scale.at != nullptr ? 1.0 / step.grad_scale.value() : 1.0;
  return x.maximize ? -factor : factor;
}

// Returns the weight of an element, exact if the parameter has a master.
template <class P>
FA_DEVICE Compute<P> weight_of(const Tensor&, P p, int16_t) {
  return widen(p);
}
FA_DEVICE float weight_of(const Tensor& x, BFloat16 p, int16_t low) {
  return x.at[kLow] != nullptr ? join(p, low) : widen(p);
}

// Loads the lower halves of masters if the parameter has a master.
template <class P, class Where>
FA_DEVICE void load_low(int16_t (&low)[Where::kCount], const Tensor& x, const Where& where) {
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (x.at[kLow] != nullptr) where.load(low, at<int16_t>(x, kLow));
  }
}

// Returns the random bits of one element. Not inlined, since ten rounds of the generator are much code. Takes
// numbers, since a reference to a struct would put it into local memory.
__device__ FA_NOINLINE inline uint32_t random_bits_of(uint64_t seed, uint32_t step, uint32_t index, int64_t element) {
  const Noise noise = {seed, step, index};
  uint32_t words[4];
  random_words(noise, element / kNoiseBlock, words);
  return bits_of_one(words, static_cast<int>(element % kNoiseBlock));
}

// Stores weights as parameters: split if there is a master, else rounded stochastically or to nearest.
template <class P, class Where>
FA_DEVICE void store_weights(const Compute<P> (&weights)[Where::kCount], const Tensor& x, uint32_t rounding_step,
                             const Where& where) {
  constexpr int kCount = Where::kCount;
  P p[kCount];
  bool is_done = false;
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (x.at[kLow] != nullptr) {
      int16_t low[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) split(weights[i], p[i], low[i]);
      where.store(low, at<int16_t>(x, kLow));
      is_done = true;
    } else if (x.numbers.rounding_step != nullptr) {
      static_assert(!Where::kAtOnce || kCount == kNoiseBlock, "one block of random numbers");
      const Noise noise = {static_cast<uint64_t>(x.seed), rounding_step, static_cast<uint32_t>(x.index)};
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int64_t element = where.element(i);
        if (Where::kAtOnce && i == 0) random_words(noise, element / kNoiseBlock, words);
        const uint32_t random =
            Where::kAtOnce ? random_bits(words, i) : random_bits_of(noise.seed, noise.step, noise.index, element);
        round_stochastically(weights[i], random, p[i]);
      }
      is_done = true;
    }
  }
  if (!is_done) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) narrow(weights[i], p[i]);
  }
  where.store(p, at<P>(x, kParam));
}

// One-element state of a tensor by value. Numbers that the tensor does not have are 0; the gain is 1.
struct Values {
  Mirror counts;
  double gain, lr_sum, lr_last;
  bool product_is_float;

  // Returns pointers to the values.
  FA_DEVICE Numbers numbers() {
    Numbers n = {&gain, &lr_sum, &lr_last, &counts.step};
    n.active_step = &counts.active_step;
    n.active_applied = &counts.active_applied;
    n.tlr_step = &counts.tlr_step;
    n.tlr_applied = &counts.tlr_applied;
    n.tlr_applied_prev = &counts.tlr_applied_prev;
    n.direction_valid = &counts.direction_valid;
    n.rounding_step = &counts.rounding_step;
    n.mu_product = &counts.mu_product;
    n.step_is_double = true;
    n.product_is_float = product_is_float;
    return n;
  }
};

// Loads the values of a tensor. All loads are issued before the first one is used.
FA_DEVICE Values values_at(const Numbers& n) {
  const auto or_else = [](const auto* at, auto other) { return at != nullptr ? *at : other; };
  const auto count = [&](const int64_t* at) { return or_else(at, int64_t{0}); };
  Values values;
  values.counts = {n.step_count(),           count(n.active_step),   count(n.active_applied),
                   count(n.tlr_step),        count(n.tlr_applied),   count(n.tlr_applied_prev),
                   count(n.direction_valid), count(n.rounding_step), n.product()};
  values.product_is_float = n.product_is_float;
  values.gain = or_else(n.gain, 1.0);
  values.lr_sum = or_else(n.lr_sum, 0.0);
  values.lr_last = or_else(n.lr_last, 0.0);
  return values;
}

// Stores the numbers that a step changes.
FA_DEVICE void put_counts(const Values& values, const Numbers n) {
  const auto put = [](auto* at, auto value) {
    if (at != nullptr) *at = value;
  };
  n.set_step(values.counts.step);
  n.set_product(values.counts.mu_product);
  put(n.active_step, values.counts.active_step);
  put(n.active_applied, values.counts.active_applied);
  put(n.tlr_step, values.counts.tlr_step);
  put(n.tlr_applied, values.counts.tlr_applied);
  put(n.direction_valid, values.counts.direction_valid);
  put(n.rounding_step, values.counts.rounding_step);
  put(n.lr_sum, values.lr_sum);
  put(n.lr_last, values.lr_last);
}

// Scalars of the backbone, kept while consecutive tensors have the same param group and step count.
struct BackboneScalars {
  Scalars<double> scalars;
  Powers powers;
  Progress now;
  int group;  // -1: not set

  FA_DEVICE bool are_of(int other_group, double other_t) const { return group == other_group && now.t == other_t; }
};

// Computes a power for backbone_scalars() in one thread, unless it is cached. counted: t is the step count plus 1.
__device__ FA_NOINLINE inline void raise_power(const Step& step, int tensor, bool counted, BackboneScalars& cache,
                                               double Hyper::* beta, double Powers::* power) {
  const Tensor& x = step.tensors[tensor];
  const double t = x.numbers.step_count() + counted;
  if (cache.are_of(x.group, t)) return;
  const bool near = step.far_hypers == nullptr;
  const Hyper& hyper = near ? step.hypers[x.group] : step.far_hypers[x.group];
  const bool is_given = near && step.powers[x.group].t == t;
  cache.powers.*power = is_given ? step.powers[x.group].powers.*power : pow(hyper.*beta, t);
}

// Computes both powers in two warps at the same time, since powers in double are slow.
template <class Backbone>
FA_DEVICE void raise_powers(const Step& step, int tensor, bool counted, BackboneScalars& cache) {
  if (!Backbone::kCorrects) return;
  if (threadIdx.x == 32) raise_power(step, tensor, counted, cache, Backbone::kFirstBase, &Powers::first);
  if (threadIdx.x == 64) raise_power(step, tensor, counted, cache, &Hyper::beta2, &Powers::second);
}

// Returns the scalars of a step. Expects a call of raise_powers() before, and a barrier in between.
template <class Backbone>
FA_DEVICE Scalars<double>& backbone_scalars(BackboneScalars& cache, const Hyper& hyper, int group,
                                            const Progress& now) {
  if (!cache.are_of(group, now.t) || cache.now.mu_product != now.mu_product) {
    cache.scalars = Scalars<double>{};
    Backbone::prepare(hyper, now, cache.powers, cache.scalars);
    cache.group = group;
    cache.now = now;
  }
  return cache.scalars;
}

// Returns the momentum of step t, from the same power as in the update.
__device__ FA_NOINLINE inline double momentum_in_step(const Step& step, int group, double t) {
  const bool near = step.far_hypers == nullptr;
  const Hyper& hyper = near ? step.hypers[group] : step.far_hypers[group];
  const bool is_given = near && step.powers[group].t == t;
  return momentum_of(hyper, is_given ? step.powers[group].powers.first : pow(hyper.mu_decay, t));
}

}  // namespace fused_adaptive::cuda
