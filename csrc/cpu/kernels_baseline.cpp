// CPU loops for any processor.
#include "kernels.h"

namespace fused_adaptive::cpu::baseline {
namespace {
#include "kernels.inl"
}  // namespace

extern const Kernels kernels = {"baseline", loops<float>(), loops<double>()};

}  // namespace fused_adaptive::cpu::baseline
