// Makes plans from addresses, for ctypes.
#include <exception>
#include <string>

#include "plan/plan.h"

using namespace fused_adaptive;

namespace {

struct Emulated {
  Plan plan;
  bool on_device;
};

thread_local std::string error;

// Returns 0, or 1 with the message in error.
template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& caught) {
    error = caught.what();
    return 1;
  }
}

std::vector<Hyper> hypers_of(const Plan& plan, const double* numbers) {
  const Hyper* all = reinterpret_cast<const Hyper*>(numbers);
  return {all, all + plan.groups.size()};
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* emulation_error() { return error.c_str(); }

Emulated* emulation_plan(int on_device) { return new Emulated{{}, on_device != 0}; }

void emulation_free(Emulated* e) { delete e; }

void emulation_group(Emulated* e, int backbone, int coupled, int maximize) {
  e->plan.groups.push_back({backbone, coupled != 0, maximize != 0});
}

void emulation_policy(Emulated* e, int kind, const double* arguments) {
  e->plan.policies.push_back({rule_of(static_cast<PolicyKind>(kind), *reinterpret_cast<const Arguments*>(arguments)), {}});
}

void emulation_member(Emulated* e, void* const* at, int64_t numel, int64_t index, int group, int active, int scalar,
                      int dtype, int step_is_double, int adapts, int first, int64_t seed) {
  Member m;
  for (int i = 0; i < kRoles; ++i) m.at[i] = at[i];
  m.numel = numel;
  m.index = index;
  m.group = group;
  m.active = active;
  m.scalar = scalar;
  m.dtype = m.grad_dtype = static_cast<DType>(dtype);
  m.step_is_double = step_is_double != 0;
  m.adapts = adapts != 0;
  m.first = first != 0;
  m.seed = seed;
  const int number = static_cast<int>(e->plan.members.size());
  for (int policy : {active, scalar}) {
    if (policy >= 0) e->plan.policies[policy].members.push_back(number);
  }
  e->plan.members.push_back(m);
}

// For tensors that are split over ranks, of which there is only one. products: zeros for each member.
void emulation_share(Emulated* e, double* products) {
  e->plan.sharing = {reinterpret_cast<Products*>(products), [] {}};
}

int emulation_step(Emulated* e, const void* const* grads, const double* hypers, const RandomRates* random_rates,
                   const float* grad_scale, const float* found_inf) {
  return guarded([&] {
    Plan& plan = e->plan;
    if (plan.executor == nullptr) plan.executor = make_cuda_executor(plan, 0, e->on_device);
    for (size_t i = 0; i < plan.members.size(); ++i) plan.members[i].grad = grads[i];
    StepInputs inputs;
    inputs.hypers = hypers_of(plan, hypers);
    inputs.random_rates = random_rates;
    inputs.grad_scale = {grad_scale, false};
    inputs.found_inf = found_inf;
    plan.executor->step(plan, inputs);
  });
}

int emulation_end_interval(Emulated* e, const double* hypers) {
  return guarded([&] {
    if (e->plan.executor == nullptr) e->plan.executor = make_cuda_executor(e->plan, 0, e->on_device);
    e->plan.executor->end_interval(e->plan, hypers_of(e->plan, hypers));
  });
}
}
