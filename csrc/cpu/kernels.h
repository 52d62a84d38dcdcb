// The CPU loops, compiled for several instruction sets: what they take, and the choice at run time.
#pragma once

#include "plan/plan.h"

// A plan has checked that no two arrays overlap; told so, compilers vectorise without run-time checks, of which GCC
// makes ten at most.
#if defined(__clang__)
#define FA_NO_OVERLAP _Pragma("clang loop vectorize(assume_safety)")
#else
#define FA_NO_OVERLAP _Pragma("GCC ivdep")
#endif

namespace fused_adaptive::cpu {

// Neighbouring elements of one tensor. T is the type they are computed in; the kernels never see another.
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
  T* previous = nullptr;  // Hypergradient's stored direction, or what TrainableLR compares with
  T* start = nullptr;
};

// Besides the modes of element.h: SGD stores its direction where its state does not give it.
constexpr int kStoresDirection = kModes;

// How G and U of an interval's inner products come about.
template <class T>
struct Measure {
  T applied = 1;    // steps in the interval: divides grad_mean_sum
  T travelled = 1;  // gain times the sum of lr: divides the displacement
  T grad_factor = 1;
};

template <class T>
struct Loops {
  using Step = void (*)(const Block<T>&, const Scalars<T>&);
  Step step[kBackbones][kModes + 1][2];  // by backbone, mode, coupled
  Step adjust;
  // <coupled g, u> with the stored direction, or with that of the state.
  double (*slope_stored)(const Block<T>&, const Scalars<T>&, bool coupled);
  double (*slope_of_state[kBackbones])(const Block<T>&, const Scalars<T>&, bool coupled);
  // TrainableLR by Source: the running interval becomes the previous one. One chunk at a time.
  Products (*measure[3])(const Block<T>&, const Measure<T>&);
  void (*load[4])(const void* from, T* to, int64_t n);  // by DType
  void (*store[4])(const T* from, void* to, int64_t n);
  // bfloat16 parameters with a master, and those that are rounded stochastically: from element `first` of their tensor.
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

// The best that this processor has; the environment variable FUSED_ADAPTIVE_CPU (baseline, v3, v4) asks for less.
const Kernels& best_kernels();

}  // namespace fused_adaptive::cpu
