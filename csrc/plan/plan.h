// Plan: the parameters of an optimizer on one device and the addresses of their state. They are checked once, so a step
// takes only the gradients. An Executor runs the step.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "rules/backbones.h"
#include "rules/element.h"
#include "rules/masters.h"
#include "rules/policy.h"
#include "rules/random_rates.h"

namespace fused_adaptive {

enum class DType : int { f32, f64, bf16, f16, i8, i64, i16 };

// Dtype of a tensor. parameter: that of the parameter. state: float64 for float64 parameters, else float32. step: that
// of torch's `step`. Others are fixed.
enum class Made { parameter, state, step, float64, int8, int16, int64 };

// Roles of a parameter's tensors in the kernels: name in C++, name in Python, dtype. Roles of tensors with the shape of
// the parameter come first.
#define FA_FOR_EACH_SHAPED_ROLE(X)                                                                          \
  X(Param, "param", parameter)                                                                              \
  X(State0, "state0", state) /* of the backbone, in the order of its struct: momentum_buffer, or exp_avg */ \
  X(State1, "state1", state)                                                                                \
  X(State2, "state2", state)                                                                                \
  X(Gain, "element_gain", state)                                                                            \
  X(GradSum, "grad_sum", state)                                                                             \
  X(SignPrev, "grad_sign_prev", int8)                                                                       \
  X(MeanSum, "grad_mean_sum", state)                                                                        \
  X(Previous, "previous", state) /* grad_mean_prev or direction_prev */                                     \
  X(Start, "interval_start", state)                                                                         \
  X(Low, "master_low", int16) /* lower half of a bfloat16 parameter's master */
#define FA_FOR_EACH_NUMBER_ROLE(X)                                                                     \
  X(Step, "step", step)                                                                                \
  X(MuProduct, "mu_product", step)                                                                     \
  X(TensorGain, "gain", float64)                                                                       \
  X(LrSum, "lr_sum", float64)                                                                          \
  X(LrLast, "lr_last", float64)                                                                        \
  X(ActiveStep, "active_step", int64)                                                                  \
  X(ActiveApplied, "active_applied", int64)                                                            \
  X(TlrStep, "tlr_step", int64)                                                                        \
  X(TlrApplied, "tlr_applied", int64)                                                                  \
  X(TlrAppliedPrev, "tlr_applied_prev", int64)                                                         \
  X(DirectionValid, "direction_valid", int64) /* Hypergradient: whether the last direction is known */ \
  X(RoundingStep, "rounding_step", int64)     /* a bfloat16 parameter with it is rounded stochastically */

#define FA_ENUMERATOR(name, text, made) k##name,
enum Role : int { FA_FOR_EACH_SHAPED_ROLE(FA_ENUMERATOR) FA_FOR_EACH_NUMBER_ROLE(FA_ENUMERATOR) kRoles };
#undef FA_ENUMERATOR
constexpr int kElementRoles = kStep;

struct Policy : Rule {
  std::vector<int> members;  // in the order of the parameters
};

// Options of a param group that are fixed when the plan is built.
struct Group {
  int backbone = 0;
  bool coupled = false, maximize = false;
};

// Parameter with state. The fields that every step checks and the first addresses come first, since the time of steps
// with many small tensors depends on the number of cache lines that they load.
struct alignas(64) Member {
  const void* grad = nullptr;  // of the current step; null: no gradient
  int64_t numel = 0;
  int64_t index = 0;  // position of the parameter over all param groups
  int64_t seed = 0;   // of stochastic rounding
  int group = 0;
  int active = -1, scalar = -1;  // policies: ActiveLR; TrainableLR or Hypergradient
  DType dtype = DType::f32;
  DType grad_dtype = DType::f32;
  bool step_is_double = false;
  bool adapts = false;
  bool first = false;              // the momentum buffer is not initialized yet
  std::array<void*, kRoles> at{};  // addresses by role; null: the state has no such entry
};

// Number on the device, float32 or float64.
struct DeviceNumber {
  const void* at = nullptr;  // null: no such number
  bool is_double = false;

  FA_INLINE double value() const {
    return is_double ? *static_cast<const double*>(at) : static_cast<double>(*static_cast<const float*>(at));
  }
};

// Inputs of one step besides gradients.
struct StepInputs {
  std::vector<Hyper> hypers;                  // by param group
  std::vector<DeviceNumber> lrs;              // by param group, for an lr that is a tensor on the device; or empty
  const RandomRates* random_rates = nullptr;  // of ASLR, on the device; null: none
  DeviceNumber grad_scale;                    // of AMP and clipping, on the device
  const float* found_inf = nullptr;
};

// Sums the inner products of shards over the ranks.
struct Sharing {
  Products* products = nullptr;  // by member, on the plan's device
  void (*sum)() = nullptr;       // sums products over the ranks, on the current stream; null: no parameter is sharded
};

struct Plan;

// How the last step or interval end on a GPU used the memory of the plan. The owner of the memory needs this to keep it
// alive.
struct Traces {
  bool is_captured = false;   // a CUDA graph points to the memory now
  bool is_elsewhere = false;  // it ran on a stream that has not used the memory before
};

class Executor {
 public:
  virtual ~Executor() = default;
  // Expects gradients, grad_scale and found_inf that have been checked.
  virtual void step(Plan& plan, const StepInputs& inputs) = 0;
  virtual void end_interval(Plan& plan, const std::vector<Hyper>& hypers) = 0;
  virtual Traces take_traces() { return {}; }
  // Returns the members whose momentum buffers have no value yet. Waits for a GPU if only it knows them.
  virtual std::vector<int64_t> unfilled(const Plan& plan) const;
  virtual std::vector<std::shared_ptr<void>> memory() const { return {}; }  // of the executor, on a GPU
};

std::unique_ptr<Executor> make_cpu_executor(const Plan& plan);
#ifdef FUSED_ADAPTIVE_WITH_CUDA
// on_device: counters are on the device, and only the device reads and counts them (capturable, fused AMP).
std::unique_ptr<Executor> make_cuda_executor(const Plan& plan, int device, bool on_device);
// Returns why the kernels cannot run on this GPU, for example because they are compiled for other GPUs; "" if they can.
std::string why_not_on_cuda(int device);
#endif

// Data of a plan without torch's types. tensors.h builds it from tensors.
struct Plan {
  std::vector<Group> groups;
  std::vector<Member> members;
  std::vector<Policy> policies;
  Sharing sharing;
  std::unique_ptr<Executor> executor;
};

inline std::vector<int64_t> Executor::unfilled(const Plan& plan) const {
  std::vector<int64_t> found;
  for (size_t i = 0; i < plan.members.size(); ++i) {
    if (plan.members[i].first) found.push_back(static_cast<int64_t>(i));
  }
  return found;
}

}  // namespace fused_adaptive
