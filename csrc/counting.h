// What a step does to the numbers that a tensor has one of, where the host can reach them: counts, gains, sums of
// rates.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "plan.h"

namespace fused_adaptive {

inline int64_t& count(const Member& m, Role role) { return *static_cast<int64_t*>(m.at[role]); }

inline int mode_of(const Member& m) {
  return (m.active >= 0 ? kScalesElements : 0) | (m.at[kMeanSum] != nullptr ? kAddsMean : 0);
}

inline double step_count(const Member& m) {
  if (m.at[kStep] == nullptr) return 0;
  return m.step_is_double ? *static_cast<double*>(m.at[kStep]) : *static_cast<float*>(m.at[kStep]);
}

inline void count_step(const Member& m) {
  if (m.at[kStep] == nullptr) return;
  if (m.step_is_double) {
    *static_cast<double*>(m.at[kStep]) += 1;
  } else {
    *static_cast<float*>(m.at[kStep]) += 1;
  }
}

inline Noise noise_of(const Member& m) {
  return {static_cast<uint64_t>(m.seed), static_cast<uint32_t>(count(m, kRoundingStep)),
          static_cast<uint32_t>(m.index)};
}

inline void count_rounding(const Member& m) {
  if (m.grad != nullptr && m.at[kRoundingStep] != nullptr) count(m, kRoundingStep) += 1;
}

inline double tensor_gain(const Member& m) {
  return m.at[kTensorGain] == nullptr ? 1.0 : *static_cast<double*>(m.at[kTensorGain]);
}

inline void ascend(const Member& m, const Policy& policy, double amount) {
  double& gain = *static_cast<double*>(m.at[kTensorGain]);
  gain = ascended(gain, amount, policy.lowest, policy.highest);
}

// Without decay the parameter stays out of the gradient, were it infinite.
template <class T>
bool decay_is_coupled(const Group& group, const Scalars<T>& r) {
  return group.coupled && r.weight_decay != 0;
}

inline double draw(const Member& m, const StepInputs& inputs) {
  return inputs.draw == nullptr ? 1.0 : drawn_factor(*inputs.draw, m.index);
}

// Of every policy, whether the step under way is the last of its interval. The count is the same in all its tensors.
inline std::vector<bool> ending_policies(const Plan& plan) {
  std::vector<bool> ending;
  for (const Policy& policy : plan.policies) {
    const Role counter = policy.kind == PolicyKind::active ? kActiveStep : kTlrStep;
    const bool counts = policy.kind != PolicyKind::hypergradient && policy.interval > 0 && !policy.members.empty();
    ending.push_back(counts && count(plan.members[policy.members[0]], counter) + 1 >= policy.interval);
  }
  return ending;
}

inline void count_active(Plan& plan, const Policy& policy, const std::vector<Hyper>& hypers) {
  for (int i : policy.members) {
    const Member& m = plan.members[i];
    count(m, kActiveStep) += 1;
    if (m.grad == nullptr) continue;
    count(m, kActiveApplied) = counted(count(m, kActiveApplied), hypers[m.group].has_rate());
  }
}

// Hypergradient: tensors that have moved have a direction of the last step.
inline void note_directions(Plan& plan, const Policy& policy) {
  for (int i : policy.members) {
    if (plan.members[i].grad != nullptr) count(plan.members[i], kDirectionValid) = 1;
  }
}

inline void restart_active(Plan& plan, const Policy& policy) {
  for (int i : policy.members) count(plan.members[i], kActiveStep) = count(plan.members[i], kActiveApplied) = 0;
}

inline void count_trainable_before(Plan& plan, const Policy& policy, const StepInputs& inputs) {
  for (int i : policy.members) {
    const Member& m = plan.members[i];
    const double lr = inputs.hypers[m.group].lr;
    if (m.grad != nullptr) count(m, kTlrApplied) += 1;
    if (m.grad != nullptr) *static_cast<double*>(m.at[kLrSum]) += lr * draw(m, inputs);
    if (policy.has_eta) *static_cast<double*>(m.at[kLrLast]) = lr;
  }
}

inline void count_trainable_after(Plan& plan, const Policy& policy) {
  for (int i : policy.members) count(plan.members[i], kTlrStep) += 1;
}

inline void restart_counts(const Member& m) {
  count(m, kTlrStep) = 0;
  count(m, kTlrApplied) = 0;
  *static_cast<double*>(m.at[kLrSum]) = 0;
}

// Whether the tensor could move in its interval; by measured directions, also by its gain.
inline bool is_measurable(const Member& m, const Policy& policy) {
  if (*static_cast<double*>(m.at[kLrSum]) == 0) return false;
  return policy.source == Source::gradient || tensor_gain(m) != 0;
}

// lr * <sum G, sum G_prev> of one tensor [TLR, D.4].
inline double slope_of_interval(const Member& m, Products products) {
  const double steps = static_cast<double>(count(m, kTlrApplied)) * static_cast<double>(count(m, kTlrAppliedPrev));
  count(m, kTlrAppliedPrev) = count(m, kTlrApplied);
  return *static_cast<double*>(m.at[kLrLast]) * (products.num * steps);
}

// The tensors of a policy, parted by gain: calls body(begin, end) with their numbers.
template <class Body>
void for_units(const Policy& policy, const Body& body) {
  const int* members = policy.members.data();
  const int n = static_cast<int>(policy.members.size());
  if (!policy.per_tensor) {
    if (n > 0) body(members, members + n);
    return;
  }
  for (int i = 0; i < n; ++i) body(members + i, members + i + 1);
}

// From the inner products of this rank's parts to those of whole tensors, on the CPU.
inline void sum_over_ranks(const Plan& plan, std::vector<Products>& products) {
  if (plan.sharing.sum == nullptr) return;
  std::copy(products.begin(), products.end(), plan.sharing.products);
  plan.sharing.sum();
  std::copy_n(plan.sharing.products, products.size(), products.begin());
}

// The backbone's scalars for the tensors of a group, which mostly have taken the same number of steps.
class ScalarsCache {
 public:
  const Scalars<double>& get(int backbone, int group, const Hyper& hyper, double t) {
    if (group != group_ || t != t_) {
      scalars_ = Scalars<double>{};
      prepare_backbone(backbone, hyper, t, scalars_);
      group_ = group;
      t_ = t;
    }
    return scalars_;
  }

 private:
  Scalars<double> scalars_{};
  int group_ = -1;
  double t_ = -1;
};

}  // namespace fused_adaptive
