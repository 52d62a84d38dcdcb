// Selects the instruction set of the loops at run time.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fused_adaptive::cpu {
#ifdef FA_X86_LEVELS
namespace {

bool wants(const char* name) {
  const char* wanted = std::getenv("FUSED_ADAPTIVE_CPU");
  return wanted == nullptr || *wanted == 0 || std::strcmp(wanted, name) == 0;
}

}  // namespace
#endif

const Kernels& best_kernels() {
#ifdef FA_X86_LEVELS
  static const Kernels& best = [&]() -> const Kernels& {
    __builtin_cpu_init();
    const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
                        __builtin_cpu_supports("lzcnt");
    const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (has_v4 && wants("v4")) return v4::kernels;
    if (has_v3 && (wants("v3") || wants("v4"))) return v3::kernels;
    return baseline::kernels;
  }();
  return best;
#else
  return baseline::kernels;
#endif
}

}  // namespace fused_adaptive::cpu
