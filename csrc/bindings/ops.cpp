// Operators and their schemas. A plan is identified by a number; the Python object that holds the number frees it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <mutex>
#include <unordered_map>

#include "cpu/kernels.h"
#include "plan/tensors.h"

#ifndef FUSED_ADAPTIVE_VERSION
#define FUSED_ADAPTIVE_VERSION "unknown"
#endif

namespace fused_adaptive {
namespace {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using Doubles = std::vector<double>;

std::mutex mutex;
int64_t next_number = 1;
std::unordered_map<int64_t, std::shared_ptr<TensorPlan>> plans;

// Returns nullopt if the layout of the tensor is not strided.
std::optional<View> view_of(const Tensor& tensor) {
  View view;
  int32_t layout;
  FA_TORCH(aoti_torch_get_layout(tensor.get(), &layout));
  if (layout != aoti_torch_layout_strided()) return std::nullopt;
  DType dtype;
  if (dtype_of(tensor.get(), dtype)) view.dtype = dtype;
  FA_TORCH(aoti_torch_get_device_type(tensor.get(), &view.device_type));
  FA_TORCH(aoti_torch_get_device_index(tensor.get(), &view.device_index));
  int64_t *sizes, *strides;
  FA_TORCH(aoti_torch_get_dim(tensor.get(), &view.dims));
  FA_TORCH(aoti_torch_get_sizes(tensor.get(), &sizes));
  FA_TORCH(aoti_torch_get_strides(tensor.get(), &strides));
  view.at = tensor.data_ptr();
  view.sizes = sizes;
  view.strides = strides;
  return view;
}

void offer(TensorPlan& plan, size_t member, const Tensor& grad) {
  const std::optional<View> view = view_of(grad);
  view ? plan.take(member, *view) : plan.refuse();
}

int64_t plan_new(Tensors params, Ints groups, Ints indices, Ints backbones, Ints coupled, Ints maximize,
                 bool on_device) {
  auto made = std::make_shared<TensorPlan>(std::move(params), groups, indices, backbones, coupled, maximize, on_device);
  const std::lock_guard<std::mutex> lock(mutex);
  plans.emplace(next_number, std::move(made));
  return next_number++;
}

void plan_bind(int64_t number, int64_t role, Ints members, Tensors tensors) {
  plan_of(number)->bind(role, members, tensors);
}

void plan_first(int64_t number, Ints members) { plan_of(number)->mark_first(members); }

void plan_parked(int64_t number, Ints members) { plan_of(number)->mark_parked(members); }

void plan_policy(int64_t number, int64_t kind, Ints members, Doubles arguments) {
  plan_of(number)->add_policy(kind, members, arguments);
}

void plan_share(int64_t number, Tensor products, int64_t sum) {
  plan_of(number)->share(std::move(products), reinterpret_cast<void (*)()>(sum));
}
void plan_seeds(int64_t number, Ints seeds) { plan_of(number)->set_seeds(seeds); }

void plan_finish(int64_t number) { plan_of(number)->finish(); }

void plan_prefetch_from(int64_t number, Ints addresses) { plan_of(number)->prefetch_from(addresses); }

// Checks and takes the gradients of the next step. held: for each member its parameter and then its state, in the order
// of binding. grads: gradients in the order of members. absent: members without a gradient, ascending.
int64_t plan_check(int64_t number, Tensors held, Tensors grads, Ints absent) {
  const std::shared_ptr<TensorPlan> plan = plan_of(number);
  FA_CHECK(grads.size() + absent.size() == plan->size(), "one gradient a parameter, but for the absent");
  plan->begin_check();
  size_t next_held = 0, next_absent = 0, next = 0;
  for (size_t i = 0; i < plan->size(); ++i) {
    for (size_t k = 0; k < plan->tensors_of(i); ++k) {
      FA_CHECK(next_held < held.size(), "parameters and state that the plan was built with are missing");
      plan->look_at(i, k, view_of(held[next_held++]).value_or(View{}));
    }
    if (next_absent < absent.size() && absent[next_absent] == static_cast<int64_t>(i)) {
      ++next_absent;
      plan->leave_out(i);
      continue;
    }
    FA_CHECK(next < grads.size(), "absent must be ascending");
    offer(*plan, i, grads[next++]);
  }
  const Readiness outcome = plan->end_check();
  plan->keep(std::move(grads));  // the dispatcher may have created these tensors, so no one else keeps them alive
  return outcome;
}

int64_t number_of(Traces traces) { return (traces.is_captured ? 1 : 0) | (traces.is_elsewhere ? 2 : 0); }

int64_t plan_step(int64_t number, Doubles hypers, std::optional<Tensor> random_rates, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf, Tensors lrs, Ints lr_groups) {
  return number_of(plan_of(number)->step(hypers, random_rates, grad_scale, found_inf, lrs, lr_groups));
}

int64_t plan_end_interval(int64_t number, Doubles hypers) { return number_of(plan_of(number)->end_interval(hypers)); }

Ints plan_unfilled(int64_t number) { return plan_of(number)->unfilled(); }

Tensors plan_memory(int64_t number) { return plan_of(number)->memory(); }

void plan_free(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  plans.erase(number);
}

int64_t plan_count() {
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int64_t>(plans.size());
}

// Takes a step of one param group without a cached plan. Its schema declares every tensor that it changes.
void step(Tensors params, Tensors grads, Tensors state, Ints roles, int64_t backbone, bool coupled, bool maximize,
          Doubles hypers, Ints policies, Doubles policy_arguments, std::optional<Tensor> random_rates,
          std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, bool on_device) {
  const size_t n = params.size();
  if (n == 0) return;
  FA_CHECK(grads.size() == n, "one gradient a parameter");
  FA_CHECK(state.size() == n * roles.size(), "state has one tensor a parameter for each of roles, in order");
  Ints numbers(n);
  for (size_t i = 0; i < n; ++i) numbers[i] = static_cast<int64_t>(i);
  TensorPlan made(params, Ints(n, 0), numbers, {backbone}, {coupled}, {maximize}, on_device);
  for (size_t i = 0; i < roles.size(); ++i) {
    made.bind(roles[i], numbers, Tensors(state.begin() + i * n, state.begin() + (i + 1) * n));
  }
  FA_CHECK(policies.empty() || policy_arguments.size() % policies.size() == 0, "arguments of equal number");
  for (size_t i = 0; i < policies.size(); ++i) {
    const size_t size = policy_arguments.size() / policies.size();
    made.add_policy(policies[i], numbers,
                    Doubles(policy_arguments.begin() + i * size, policy_arguments.begin() + (i + 1) * size));
  }
  made.finish();
  made.begin_check();
  for (size_t i = 0; i < n; ++i) offer(made, i, grads[i]);
  const Readiness outcome = made.end_check();
  FA_CHECK(outcome == kReady, outcome == kStale ? "state of the backbone is missing"
                                                : "gradients must be dense and laid out as their parameters");
  made.step(hypers, random_rates, grad_scale, found_inf);
}

std::string build_version() { return FUSED_ADAPTIVE_VERSION; }
std::string why_not_on_gpu(int64_t device) {
#ifdef FUSED_ADAPTIVE_WITH_CUDA
  return why_not_on_cuda(static_cast<int>(device));
#else
  return "it has no CUDA kernels";
#endif
}
std::string cpu_capability() { return cpu::best_kernels().name; }

}  // namespace

std::shared_ptr<TensorPlan> plan_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(number);
  FA_CHECK(found != plans.end(), "there is no plan ", number);
  return found->second;
}

STABLE_TORCH_LIBRARY(fused_adaptive, m) {
  m.def(
      "step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, int[] roles, int backbone, bool coupled, "
      "bool maximize, float[] hypers, int[] policies, float[] policy_arguments, Tensor? random_rates=None, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, bool on_device=False) -> ()");
  m.def(
      "plan_new(Tensor[] params, int[] groups, int[] indices, int[] backbones, int[] coupled, int[] maximize, "
      "bool on_device) -> int");
  m.def("plan_bind(int plan, int role, int[] members, Tensor[] tensors) -> ()");
  m.def("plan_first(int plan, int[] members) -> ()");
  m.def("plan_parked(int plan, int[] members) -> ()");
  m.def("plan_policy(int plan, int kind, int[] members, float[] arguments) -> ()");
  m.def("plan_share(int plan, Tensor products, int sum) -> ()");
  m.def("plan_seeds(int plan, int[] seeds) -> ()");
  m.def("plan_finish(int plan) -> ()");
  m.def("plan_prefetch_from(int plan, int[] addresses) -> ()");
  m.def("plan_check(int plan, Tensor[] held, Tensor[] grads, int[] absent) -> int");
  m.def("python_calls() -> int[]");
  m.def(
      "plan_step(int plan, float[] hypers, Tensor? random_rates, Tensor? grad_scale, Tensor? found_inf, Tensor[] lrs, "
      "int[] lr_groups) -> int");
  m.def("plan_end_interval(int plan, float[] hypers) -> int");
  m.def("plan_unfilled(int plan) -> int[]");
  m.def("plan_memory(int plan) -> Tensor[]");
  m.def("plan_free(int plan) -> ()");
  m.def("plan_count() -> int");
  m.def("declarations() -> str");
  m.def("build_version() -> str");
  m.def("cpu_capability() -> str");
  m.def("why_not_on_gpu(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_adaptive, CompositeExplicitAutograd, m) {
  m.impl("step", TORCH_BOX(&step));
  m.impl("plan_new", TORCH_BOX(&plan_new));
  m.impl("plan_bind", TORCH_BOX(&plan_bind));
  m.impl("plan_first", TORCH_BOX(&plan_first));
  m.impl("plan_parked", TORCH_BOX(&plan_parked));
  m.impl("plan_policy", TORCH_BOX(&plan_policy));
  m.impl("plan_share", TORCH_BOX(&plan_share));
  m.impl("plan_seeds", TORCH_BOX(&plan_seeds));
  m.impl("plan_finish", TORCH_BOX(&plan_finish));
  m.impl("plan_prefetch_from", TORCH_BOX(&plan_prefetch_from));
  m.impl("plan_check", TORCH_BOX(&plan_check));
  m.impl("python_calls", TORCH_BOX(&python_calls));
  m.impl("plan_step", TORCH_BOX(&plan_step));
  m.impl("plan_end_interval", TORCH_BOX(&plan_end_interval));
  m.impl("plan_unfilled", TORCH_BOX(&plan_unfilled));
  m.impl("plan_memory", TORCH_BOX(&plan_memory));
  m.impl("plan_free", TORCH_BOX(&plan_free));
  m.impl("plan_count", TORCH_BOX(&plan_count));
  m.impl("declarations", TORCH_BOX(&declarations));
  m.impl("build_version", TORCH_BOX(&build_version));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("why_not_on_gpu", TORCH_BOX(&why_not_on_gpu));
}

}  // namespace fused_adaptive
