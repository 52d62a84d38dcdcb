// CPU loops for x86-64-v3 (AVX2).
#include "kernels.h"

#ifdef FA_X86_LEVELS
// After all headers, since functions that they define must run on any processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,f16c,lzcnt,movbe"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2,f16c,lzcnt,movbe")
#endif

namespace fused_adaptive::cpu::v3 {
namespace {
#include "kernels.inl"
}  // namespace

extern const Kernels kernels = {"v3", loops<float>(), loops<double>()};

}  // namespace fused_adaptive::cpu::v3

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
