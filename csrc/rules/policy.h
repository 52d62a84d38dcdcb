// Arguments of a policy.
#pragma once

#include "gain.h"
#include "hyper.h"

namespace fused_adaptive {

enum class PolicyKind : int { active, trainable, hypergradient };
enum class Source : int { displacement, gradient, preconditioned };

// Arguments of a policy with their types.
struct Rule {
  PolicyKind kind;
  int64_t interval = 0;  // 0: only end_interval() ends an interval
  bool per_tensor = false;
  double lowest = 0, highest = 0;  // bounds of gains
  // ActiveLR
  bool has_increment = false;
  double increment = 0, high = 0, low = 1;
  bool holds = false;
  // TrainableLR
  double c = 0;  // largest relative growth of a gain in one interval
  Source source = Source::displacement;
  bool has_eta = false;
  double eta = 0;
  // Hypergradient
  double hyper_lr = 0;
};

// Arguments of a policy as Python passes them: as doubles, with NaN for None.
#define FA_FOR_EACH_ARGUMENT(X) \
  X(interval) X(per_tensor) X(lowest) X(highest) X(increment) X(high) X(low) X(holds) X(c) X(source) X(eta) X(hyper_lr)
struct Arguments {
#define FA_FIELD(name) double name;
  FA_FOR_EACH_ARGUMENT(FA_FIELD)
#undef FA_FIELD
};
constexpr int kArguments = sizeof(Arguments) / sizeof(double);

inline Rule rule_of(PolicyKind kind, const Arguments& from) {
  const auto is_given = [](double number) { return number == number; };
  Rule rule;
  rule.kind = kind;
  rule.interval = static_cast<int64_t>(from.interval);
  rule.per_tensor = from.per_tensor != 0;
  rule.lowest = from.lowest;
  rule.highest = from.highest;
  rule.has_increment = is_given(from.increment);
  rule.increment = rule.has_increment ? from.increment : 0;
  rule.high = from.high;
  rule.low = from.low;
  rule.holds = from.holds != 0;
  rule.c = from.c;
  rule.source = static_cast<Source>(static_cast<int>(from.source));
  rule.has_eta = is_given(from.eta);
  rule.eta = rule.has_eta ? from.eta : 0;
  rule.hyper_lr = from.hyper_lr;
  return rule;
}

// Sets ActiveLR's scalars for the tensors of one param group.
FA_INLINE void prepare_active(const Rule& rule, const Hyper& hyper, Scalars<double>& r) {
  r.high = rule.has_increment ? rule.increment / hyper.lr_ref : rule.high;
  r.low = rule.low;
  r.lowest = rule.lowest;
  r.highest = rule.highest;
  r.holds = rule.holds;
}

}  // namespace fused_adaptive
