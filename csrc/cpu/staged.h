// Arrays of a chunk for the loops: pointers into the arrays of a tensor, converted if they have another type.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "plan/members.h"

namespace fused_adaptive::cpu {

// Chunk of one tensor: the unit of work and of inner products.
struct Chunk {
  int member;
  int64_t begin, n;
};

// Elements that are converted at a time. They fit into the first-level cache.
constexpr int64_t kStaged = 1024;

template <class T>
T* at(const Member& m, Role role, int64_t offset) {
  T* base = static_cast<T*>(m.at[role]);
  return base == nullptr ? nullptr : base + offset;
}

template <class T>
Block<T> state_block(const Member& m, int64_t begin, int64_t n) {
  Block<T> block;
  block.n = n;
  for (int i = 0; i < 3; ++i) block.state[i] = at<T>(m, static_cast<Role>(kState0 + i), begin);
  block.mean_sum = at<T>(m, kMeanSum, begin);
  block.gain = at<T>(m, kGain, begin);
  block.grad_sum = at<T>(m, kGradSum, begin);
  block.sign_prev = at<int8_t>(m, kSignPrev, begin);
  block.previous = at<T>(m, kPrevious, begin);
  block.start = at<T>(m, kStart, begin);
  return block;
}

inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline const void* offset(const void* base, DType dtype, int64_t elements) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}

template <class T>
constexpr DType own_dtype() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

// Loads parameters in the type of the arithmetic, exact if they have a master.
template <class T>
void load_weights(const Loops<T>& loops, const Member& m, int64_t begin, int64_t n, T* to) {
  const void* p = offset(m.at[kParam], m.dtype, begin);
  if (m.at[kLow] != nullptr) return loops.join(p, at<int16_t>(m, kLow, begin), to, n);
  loops.load[static_cast<int>(m.dtype)](p, to, n);
}

template <class T>
void store_weights(const Loops<T>& loops, const Member& m, int64_t begin, int64_t n, const T* from) {
  void* p = const_cast<void*>(offset(m.at[kParam], m.dtype, begin));
  if (m.at[kLow] != nullptr) return loops.split(from, p, at<int16_t>(m, kLow, begin), n);
  if (m.at[kRoundingStep] != nullptr) return loops.round(from, p, begin, n, noise_of(m));
  loops.store[static_cast<int>(m.dtype)](from, p, n);
}

// Parameter and gradient of a chunk in the type of the arithmetic. They are used in place if they have this type.
template <class T>
class Staged {
 public:
  Staged(const Kernels& kernels, const Member& m, const Chunk& chunk, bool with_grad)
      : loops_(kernels.loops<T>()), m_(m), chunk_(chunk), with_grad_(with_grad && m.grad != nullptr) {}

  // Calls body(block) for blocks of `stretch` elements; for the whole chunk if nothing has to be converted.
  template <class Body>
  void each(bool writes, int64_t stretch, const Body& body) {
    const bool p_own = m_.dtype == own_dtype<T>(), g_own = !with_grad_ || m_.grad_dtype == own_dtype<T>();
    if (p_own && g_own) stretch = chunk_.n;
    for (int64_t done = 0; done < chunk_.n; done += stretch) {
      const int64_t begin = chunk_.begin + done, n = std::min(stretch, chunk_.n - done);
      Block<T> block = state_block<T>(m_, begin, n);
      block.p = p_own ? at<T>(m_, kParam, begin) : p_;
      if (!p_own) load_weights(loops_, m_, begin, n, p_);
      if (with_grad_) {
        const void* g = offset(m_.grad, m_.grad_dtype, begin);
        block.g = g_own ? static_cast<const T*>(g) : g_;
        if (!g_own) loops_.load[static_cast<int>(m_.grad_dtype)](g, g_, n);
      }
      body(block);
      if (writes && !p_own) store_weights(loops_, m_, begin, n, p_);
    }
  }

 private:
  const Loops<T>& loops_;
  const Member& m_;
  const Chunk& chunk_;
  const bool with_grad_;
  T p_[kChunk], g_[kChunk];
};

}  // namespace fused_adaptive::cpu
