// Operator of the null step: its schema and checks.
#include "plan/null.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "plan/tensors.h"

namespace fused_adaptive {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void null_step(Tensor param, std::vector<Tensor> written, std::vector<Tensor> grads, std::vector<Tensor> read,
               int64_t mask) {
  const ScalarType dtype = param.scalar_type();
  const bool narrow = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  FA_CHECK(narrow || dtype == ScalarType::Float, "null_step: param must be float32, bfloat16 or float16");
  FA_CHECK(written.size() <= kMostWritten && grads.size() <= kMostGrads && read.size() <= kMostRead,
           "null_step: at most ", kMostWritten, " written, ", kMostGrads, " grads and ", kMostRead, " read");
  NullStep step = {};
  step.param_bytes = narrow ? 2 : 4;
  step.n = param.numel();
  step.mask = static_cast<uint32_t>(mask);
  const auto address = [&](const Tensor& t, ScalarType wanted) {
    FA_CHECK(t.scalar_type() == wanted && t.numel() == step.n && t.is_contiguous(),
             "null_step: every array must be contiguous, with as many elements as param; grads in its dtype, "
             "written and read in float32");
    FA_CHECK(t.is_cpu() == param.is_cpu() && t.get_device_index() == param.get_device_index(),
             "null_step: every array must be on param's device");
    return t.data_ptr();
  };
  step.param = address(param, dtype);
  for (const Tensor& t : written) step.written[step.n_written++] = address(t, ScalarType::Float);
  for (const Tensor& t : grads) step.grads[step.n_grads++] = address(t, dtype);
  for (const Tensor& t : read) step.read[step.n_read++] = address(t, ScalarType::Float);
  bool exists = false;
  with_streams(step, [&](auto, auto, auto, auto) { exists = true; });
  FA_CHECK(exists, "null_step: no step writes ", written.size(), " arrays and reads ", grads.size(), " + ", read.size(),
           " besides the parameter");
  if (step.n == 0) return;
  if (param.is_cpu()) return null_step_cpu(step);
#ifdef FUSED_ADAPTIVE_WITH_CUDA
  if (param.is_cuda()) return null_step_cuda(step, param.get_device_index());
#endif
  FA_CHECK(false, "null_step: there is no kernel for this device in this build");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_adaptive, m) {
  m.def("null_step(Tensor(a!) param, Tensor(b!)[] written, Tensor[] grads, Tensor[] read, int mask=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_adaptive, CompositeExplicitAutograd, m) { m.impl("null_step", TORCH_BOX(&null_step)); }

}  // namespace fused_adaptive
