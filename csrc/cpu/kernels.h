// Interface of the CPU loops, which are compiled for several instruction sets, and the choice at run time.
#pragma once

#include "plan/plan.h"

// The plan has checked that no two arrays overlap. With this pragma compilers vectorize without run-time checks for
// overlap, of which GCC inserts at most ten.
#if defined(__clang__)
#define FA_NO_OVERLAP _Pragma("clang loop vectorize(assume_safety)")
#else
#define FA_NO_OVERLAP _Pragma("GCC ivdep")
#endif

namespace fused_adaptive::cpu {

// Adjacent elements of one tensor. T is the type of the arithmetic; the loops use no other type.
template <class T>
struct Block {
  int64_t n = 0;
  T* p = nullptr;
  const T* g = nullptr;
  T* state[3] = {nullptr, nullptr, nullptr};
  T* mean_sum = nullptr;
  T* gain = nullptr;
  T* grad_sum = nullptr;
  int8_t* sign_prev = nullptr;
  T* previous = nullptr;  // Hypergradient's stored direction, or TrainableLR's direction of the previous interval
  T* start = nullptr;
};

// Mode besides those of element.h: SGD stores its direction if it cannot be computed from the state.
constexpr int kStoresDirection = kModes;

// Factors of the mean gradient and the mean direction in the inner products of an interval.
template <class T>
struct Measure {
  T applied = 1;    // applied steps in the interval; divides grad_mean_sum
  T travelled = 1;  // gain times the sum of lr; divides the displacement
  T grad_factor = 1;
};

template <class T>
struct Loops {
  using Step = void (*)(const Block<T>&, const Scalars<T>&);
  Step step[kBackbones][kModes + 1][2];  // by backbone, mode, coupled
  Step adjust;
  // <coupled g, u> with the stored direction, or with the direction of the state.
  double (*slope_stored)(const Block<T>&, const Scalars<T>&, bool coupled);
  double (*slope_of_state[kBackbones])(const Block<T>&, const Scalars<T>&, bool coupled);
  // TrainableLR's inner products of one chunk, by Source. The running interval becomes the previous one.
  Products (*measure[3])(const Block<T>&, const Measure<T>&);
  void (*load[4])(const void* from, T* to, int64_t n);  // by DType
  void (*store[4])(const T* from, void* to, int64_t n);
  // For bfloat16 parameters with a master or stochastic rounding. first: index of the first element in its tensor.
  void (*join)(const void* high, const int16_t* low, T* to, int64_t n);
  void (*split)(const T* from, void* high, int16_t* low, int64_t n);
  void (*round)(const T* from, void* to, int64_t first, int64_t n, const Noise& noise);
};

struct Kernels {
  const char* name;
  Loops<float> f32;
  Loops<double> f64;

  template <class T>
  const Loops<T>& loops() const;
};
template <>
inline const Loops<float>& Kernels::loops<float>() const {
  return f32;
}
template <>
inline const Loops<double>& Kernels::loops<double>() const {
  return f64;
}

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FA_X86_LEVELS 1
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
#endif

// Returns the loops for the widest instruction set of this processor. The environment variable FUSED_ADAPTIVE_CPU
// (baseline, v3, v4) selects a narrower one.
const Kernels& best_kernels();

}  // namespace fused_adaptive::cpu
