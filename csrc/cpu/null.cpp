// Null step on the CPU: chunks, threads and vectors as in executor.cpp, without arithmetic.
#include "plan/null.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace fused_adaptive::cpu {
namespace {

using Pass = void (*)(const NullStep&, int64_t begin, int64_t n);

// Adjacent chunks that a thread takes at a time, as in executor.cpp.
constexpr int64_t kBin = 2;

namespace null_baseline {
#include "null.inl"
}

void run(const NullStep& step, Pass pass) {
  const int64_t chunks = chunks_of(step.n), bins = (chunks + kBin - 1) / kBin;
  torch::stable::parallel_for(0, bins, 1, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(step.n, last * kBin * kChunk);
    for (int64_t begin = first * kBin * kChunk; begin < end; begin += kChunk) {
      pass(step, begin, std::min(kChunk, end - begin));
    }
  });
}

}  // namespace
}  // namespace fused_adaptive::cpu

// After all headers and all other code, since only the selected loops may use these instruction sets.
#ifdef FA_X86_LEVELS
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2")
#endif
namespace fused_adaptive::cpu {
namespace {
namespace null_v3 {
#include "null.inl"
}
}  // namespace
}  // namespace fused_adaptive::cpu
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#endif
namespace fused_adaptive::cpu {
namespace {
namespace null_v4 {
#include "null.inl"
}
}  // namespace
}  // namespace fused_adaptive::cpu
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace fused_adaptive {

void null_step_cpu(const NullStep& step) {
#ifdef FA_X86_LEVELS
  const char* level = cpu::best_kernels().name;
  if (std::strcmp(level, "v4") == 0) return cpu::run(step, cpu::null_v4::choose(step));
  if (std::strcmp(level, "v3") == 0) return cpu::run(step, cpu::null_v3::choose(step));
#endif
  cpu::run(step, cpu::null_baseline::choose(step));
}

}  // namespace fused_adaptive
