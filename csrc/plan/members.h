// Helpers of the executors for the members and policies of a plan.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "plan.h"
#include "rules/intervals.h"

namespace fused_adaptive {

inline int64_t& count(const Member& m, Role role) { return *static_cast<int64_t*>(m.at[role]); }

inline int mode_of(const Member& m) {
  return (m.active >= 0 ? kScalesElements : 0) | (m.at[kMeanSum] != nullptr ? kAddsMean : 0);
}

// Returns pointers to the one-element state of a member. For parameters on a GPU some of them are to device memory.
inline Numbers numbers_of(const Member& m) {
  const auto real = [&](Role role) { return static_cast<double*>(m.at[role]); };
  const auto whole = [&](Role role) { return static_cast<int64_t*>(m.at[role]); };
  return {real(kTensorGain),      real(kLrSum),          real(kLrLast),    m.at[kStep],        m.at[kMuProduct],
          whole(kActiveStep),     whole(kActiveApplied), whole(kTlrStep),  whole(kTlrApplied), whole(kTlrAppliedPrev),
          whole(kDirectionValid), whole(kRoundingStep),  m.step_is_double, !m.step_is_double};
}

// Counts a step of a tensor whose counts are on the host.
inline Progress count_step(const Numbers& n, const Hyper& hyper) {
  n.count_step();
  const double t = n.step_count();
  if (n.mu_product == nullptr) return {t, 1};
  n.set_product(n.next_product(momentum_of(hyper, pow(hyper.mu_decay, t))));
  return {t, n.product()};
}

inline Noise noise_of(const Member& m) {
  return {static_cast<uint64_t>(m.seed), static_cast<uint32_t>(count(m, kRoundingStep)),
          static_cast<uint32_t>(m.index)};
}

inline double tensor_gain(const Member& m) {
  return m.at[kTensorGain] == nullptr ? 1.0 : *static_cast<double*>(m.at[kTensorGain]);
}

// Without decay the parameter is not added, even as 0 * p: p could be infinite.
template <class T>
bool decay_is_coupled(const Group& group, const Scalars<T>& r) {
  return group.coupled && r.weight_decay != 0;
}

inline double rate_factor_of(const Member& m, const StepInputs& inputs) {
  return inputs.random_rates == nullptr ? 1.0 : rate_factor(*inputs.random_rates, m.index);
}

// Returns for each policy whether the current step is the last of its interval. All tensors of a policy have the same
// count.
inline std::vector<bool> ending_policies(const Plan& plan) {
  std::vector<bool> ending;
  for (const Policy& policy : plan.policies) {
    const Role counter = policy.kind == PolicyKind::active ? kActiveStep : kTlrStep;
    const bool counts = policy.kind != PolicyKind::hypergradient && !policy.members.empty();
    ending.push_back(counts && ends_at(policy, count(plan.members[policy.members[0]], counter) + 1));
  }
  return ending;
}

// Calls body(begin, end) for each gain of a policy, with the numbers of the members that share it.
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

// Replaces the inner products of this rank's shards by those of whole tensors, on the CPU.
inline void sum_over_ranks(const Plan& plan, std::vector<Products>& products) {
  if (plan.sharing.sum == nullptr) return;
  std::copy(products.begin(), products.end(), plan.sharing.products);
  plan.sharing.sum();
  std::copy_n(plan.sharing.products, products.size(), products.begin());
}

// Keeps the scalars of the last param group and progress, since most tensors of a param group have the same.
class ScalarsCache {
 public:
  const Scalars<double>& get(int backbone, int group, const Hyper& hyper, const Progress& now) {
    if (group != group_ || now.t != now_.t || now.mu_product != now_.mu_product) {
      scalars_ = Scalars<double>{};
      prepare_backbone(backbone, hyper, now, scalars_);
      group_ = group;
      now_ = now;
    }
    return scalars_;
  }

 private:
  Scalars<double> scalars_{};
  int group_ = -1;
  Progress now_{};
};

}  // namespace fused_adaptive
