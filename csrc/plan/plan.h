// A plan: the parameters of an optimizer on one device with the addresses of their state, checked once, so that a step
// takes the gradients alone. What a step does with it is up to an Executor.
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

// What a tensor's dtype is: its parameter's; float64 for float64 parameters, else float32; torch's for `step`; or
// fixed.
enum class Made { parameter, state, step, float64, int8, int16, int64 };

// What a parameter's tensors are to the kernels: the name here, the name in Python, the dtype. Those that are shaped as
// the parameter come first.
#define FA_FOR_EACH_SHAPED_ROLE(X)                                                                         \
  X(Param, "param", parameter)                                                                             \
  X(State0, "state0", state) /* the backbone's, in the order of its struct: momentum_buffer, or exp_avg */ \
  X(State1, "state1", state)                                                                               \
  X(State2, "state2", state)                                                                               \
  X(Gain, "element_gain", state)                                                                           \
  X(GradSum, "grad_sum", state)                                                                            \
  X(SignPrev, "grad_sign_prev", int8)                                                                      \
  X(MeanSum, "grad_mean_sum", state)                                                                       \
  X(Previous, "previous", state) /* grad_mean_prev or direction_prev */                                    \
  X(Start, "interval_start", state)                                                                        \
  X(Low, "master_low", int16) /* the other half of a bfloat16 parameter's float32 weight */
#define FA_FOR_EACH_NUMBER_ROLE(X)                                                                               \
  X(Step, "step", step)                                                                                          \
  X(TensorGain, "gain", float64)                                                                                 \
  X(LrSum, "lr_sum", float64)                                                                                    \
  X(LrLast, "lr_last", float64)                                                                                  \
  X(ActiveStep, "active_step", int64)                                                                            \
  X(ActiveApplied, "active_applied", int64)                                                                      \
  X(TlrStep, "tlr_step", int64)                                                                                  \
  X(TlrApplied, "tlr_applied", int64)                                                                            \
  X(TlrAppliedPrev, "tlr_applied_prev", int64)                                                                   \
  X(DirectionValid, "direction_valid", int64) /* Hypergradient: whether there is a direction of the last step */ \
  X(RoundingStep, "rounding_step", int64)     /* a bfloat16 parameter that has it is rounded stochastically */

#define FA_ENUMERATOR(name, text, made) k##name,
enum Role : int { FA_FOR_EACH_SHAPED_ROLE(FA_ENUMERATOR) FA_FOR_EACH_NUMBER_ROLE(FA_ENUMERATOR) kRoles };
#undef FA_ENUMERATOR
constexpr int kElementRoles = kStep;

struct Policy : Rule {
  std::vector<int> members;  // in the order of the parameters
};

// A param group's structure.
struct Group {
  int backbone = 0;
  bool coupled = false, maximize = false;
};

// A parameter that has state. What every step's checks ask for, and the first of the addresses, come first: with many
// small tensors, steps take as long as fetching lines of caches does.
struct alignas(64) Member {
  // of the step under way
  const void* grad = nullptr;  // null: it does not take part
  int64_t numel = 0;
  int64_t index = 0;  // its position over all param groups
  int64_t seed = 0;   // of stochastic rounding
  int group = 0;
  int active = -1, scalar = -1;  // its policies: ActiveLR; TrainableLR or Hypergradient
  DType dtype = DType::f32;
  DType grad_dtype = DType::f32;
  bool step_is_double = false;
  bool adapts = false;
  bool first = false;              // its momentum buffer holds nothing yet
  std::array<void*, kRoles> at{};  // null where its state has no such entry
};

// A number on the device, float32 or float64.
struct DeviceNumber {
  const void* at = nullptr;  // null: there is none
  bool is_double = false;

  FA_INLINE double value() const {
    return is_double ? *static_cast<const double*>(at) : static_cast<double>(*static_cast<const float*>(at));
  }
};

// What changes from step to step.
struct StepInputs {
  std::vector<Hyper> hypers;                  // of each group
  std::vector<DeviceNumber> lrs;              // of each group whose lr is a tensor on the device; empty: none is
  const RandomRates* random_rates = nullptr;  // ASLR's; on the device; null: none
  DeviceNumber grad_scale;                    // AMP and clipping, on the device
  const float* found_inf = nullptr;
};

// Where other ranks hold parts of a plan's parameters: how inner products become those of the whole.
struct Sharing {
  Products* products = nullptr;  // of each member, on the plan's device
  void (*sum)() = nullptr;       // sums them over the ranks, on the current stream; null: every parameter is whole
};

struct Plan;

// What those who own memory have to know of the last step or interval's end on a GPU.
struct Traces {
  bool is_captured = false;   // a CUDA graph points to the plan's memory now
  bool is_elsewhere = false;  // it ran on a stream that the memory has not been used on before
};

class Executor {
 public:
  virtual ~Executor() = default;
  // Gradients, grad_scale and found_inf have been checked.
  virtual void step(Plan& plan, const StepInputs& inputs) = 0;
  virtual void end_interval(Plan& plan, const std::vector<Hyper>& hypers) = 0;
  virtual Traces take_traces() { return {}; }
  virtual std::vector<std::shared_ptr<void>> memory() const { return {}; }  // on a GPU
};

std::unique_ptr<Executor> make_cpu_executor(const Plan& plan);
#ifdef FUSED_ADAPTIVE_WITH_CUDA
// on_device: counters live on the device and may be read and counted there alone (capturable, fused AMP).
std::unique_ptr<Executor> make_cuda_executor(const Plan& plan, int device, bool on_device);
// "", or why the kernels cannot run on this GPU: they are compiled for others, for example.
std::string why_not_on_cuda(int device);
#endif

// The pure data of a plan; the torch tensors that keep it alive are in tensors.h.
struct Plan {
  std::vector<Group> groups;
  std::vector<Member> members;
  std::vector<Policy> policies;
  Sharing sharing;
  std::unique_ptr<Executor> executor;
};

}  // namespace fused_adaptive
