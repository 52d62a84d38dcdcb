// CPU loops for x86-64-v4 (AVX-512).
#include "kernels.h"

#ifdef FA_X86_LEVELS
// After all headers, since functions that they define must run on any processor.
#if defined(__clang__)
#pragma clang attribute push(                                                                              \
    __attribute__((target("avx2,bmi,bmi2,f16c,lzcnt,movbe,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2,f16c,lzcnt,movbe,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#endif

namespace fused_adaptive::cpu::v4 {
namespace {
#include "kernels.inl"
}  // namespace

extern const Kernels kernels = {"v4", loops<float>(), loops<double>()};

}  // namespace fused_adaptive::cpu::v4

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
