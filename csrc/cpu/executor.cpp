// Step on the CPU: scalar arithmetic for one-element state, and loops over chunks for the other tensors.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "plan/members.h"
#include "staged.h"

namespace fused_adaptive::cpu {
namespace {

// Cost of a chunk besides its elements, in elements. It balances many tiny tensors against a few large ones.
constexpr int64_t kChunkCost = 512;
constexpr int64_t kBinCost = 2 * kChunk;

class CpuExecutor : public Executor {
 public:
  explicit CpuExecutor(const Plan& plan) : kernels_(best_kernels()) {
    int64_t cost = 0;
    for (int m = 0; m < static_cast<int>(plan.members.size()); ++m) {
      first_chunk_.push_back(static_cast<int64_t>(chunks_.size()));
      const int64_t numel = plan.members[m].numel;
      for (int64_t begin = 0; begin < numel; begin += kChunk) {
        if (cost == 0 || cost > kBinCost) {
          bins_.push_back(static_cast<int64_t>(chunks_.size()));
          cost = 0;
        }
        chunks_.push_back({m, begin, std::min(kChunk, numel - begin)});
        cost += chunks_.back().n + kChunkCost;
      }
      if (numel == 0 || numel > kChunk) not_whole_.push_back(m);
      rounds_ = rounds_ || plan.members[m].at[kRoundingStep] != nullptr;
    }
    bins_.push_back(static_cast<int64_t>(chunks_.size()));
    partials_.resize(chunks_.size());
    scalars_.resize(plan.members.size());
    outcomes_.resize(plan.members.size());
    uncounted_.resize(plan.members.size());
  }

  void step(Plan& plan, const StepInputs& given) override {
    StepInputs inputs = given;
    for (size_t i = 0; i < inputs.lrs.size(); ++i) {
      if (inputs.lrs[i].at != nullptr) inputs.hypers[i].lr = inputs.lrs[i].value();
    }
    if (inputs.found_inf != nullptr && *inputs.found_inf != 0) return;
    grad_factor_ = inputs.grad_scale.at != nullptr ? 1.0 / inputs.grad_scale.value() : 1.0;
    const std::vector<bool> ending = ending_policies(plan);
    std::vector<std::vector<bool>> measured(plan.policies.size());
    for (size_t i = 0; i < plan.policies.size(); ++i) {
      Policy& policy = plan.policies[i];
      if (policy.kind == PolicyKind::hypergradient) follow_slope(plan, policy, inputs);
      const bool measures = policy.kind == PolicyKind::trainable && policy.source == Source::gradient;
      if (measures && ending[i]) measured[i] = adapt(plan, policy, inputs.hypers, &inputs);
    }
    update(plan, inputs, ending);
    if (rounds_) {
      for (const Member& m : plan.members) {
        if (m.grad != nullptr) numbers_of(m).count_rounding();
      }
    }
    for (size_t i = 0; i < plan.policies.size(); ++i) {
      Policy& policy = plan.policies[i];
      count_members(plan, policy, inputs);
      if (policy.kind != PolicyKind::trainable || !ending[i]) continue;
      if (policy.source != Source::gradient) measured[i] = adapt(plan, policy, inputs.hypers, nullptr);
      begin_trainable(plan, policy, measured[i]);
    }
  }

  void end_interval(Plan& plan, const std::vector<Hyper>& hypers) override {
    for (Policy& policy : plan.policies) {
      if (policy.kind == PolicyKind::active) {
        for_chunks([&](const Chunk& chunk) {
          const Member& m = plan.members[chunk.member];
          if (plan_policy(plan, m.active) != &policy) return;
          end_chunk(m, chunk, policy, hypers[m.group], end_by_hand(numbers_of(m)));
        });
        for (int i : policy.members) restart_active(numbers_of(plan.members[i]));
      } else if (policy.kind == PolicyKind::trainable) {
        begin_trainable(plan, policy, adapt(plan, policy, hypers, nullptr));
      }
    }
  }

 private:
  static const Policy* plan_policy(const Plan& plan, int index) {
    return index < 0 ? nullptr : &plan.policies[static_cast<size_t>(index)];
  }

  // Counts a step that was taken.
  static void count_members(const Plan& plan, const Policy& policy, const StepInputs& inputs) {
    for (int i : policy.members) {
      const Member& m = plan.members[i];
      const Hyper& hyper = inputs.hypers[m.group];
      if (policy.kind == PolicyKind::active) {
        count_active(policy, numbers_of(m), m.grad != nullptr, hyper.has_rate());
      } else {
        count_scalar(policy, numbers_of(m), m.grad != nullptr, hyper.lr, rate_factor_of(m, inputs));
      }
    }
  }

  // Calls body(chunk) for all chunks, in parallel.
  template <class Body>
  void for_chunks(const Body& body) {
    for_ranges([&](const Chunk* begin, const Chunk* end) { std::for_each(begin, end, body); });
  }

  // Calls body(begin, end) for ranges of chunks, in parallel.
  template <class Body>
  void for_ranges(const Body& body) {
    const int64_t bins = static_cast<int64_t>(bins_.size()) - 1;
    if (bins <= 0) return;
    torch::stable::parallel_for(0, bins, 1, [&](int64_t begin, int64_t end) {
      body(chunks_.data() + bins_[begin], chunks_.data() + bins_[end]);
    });
  }

  // Sets r to the scalars of a tensor and counts its step; does nothing if the tensor has no gradient.
  void prepare(Plan& plan, const StepInputs& inputs, int member, ScalarsCache& cache, Scalars<double>& r) {
    Member& m = plan.members[member];
    const Group& group = plan.groups[m.group];
    if (m.grad == nullptr) return;
    const Hyper& hyper = inputs.hypers[m.group];
    r = cache.get(group.backbone, m.group, hyper, count_step(numbers_of(m), hyper));
    r.grad_factor = group.maximize ? -grad_factor_ : grad_factor_;
    r.first = m.first;
    prepare_rate(hyper, rate_factor_of(m, inputs) * tensor_gain(m), m.adapts, r);
    m.first = false;
  }

  // The thread that updates a tensor of one chunk also prepares it. This overlaps with loads of its data, and no other
  // thread needs the scalars.
  void update(Plan& plan, const StepInputs& inputs, const std::vector<bool>& ending) {
    ScalarsCache of_large;
    for (int member : not_whole_) prepare(plan, inputs, member, of_large, scalars_[member]);
    for_ranges([&](const Chunk* begin, const Chunk* end) {
      ScalarsCache cache;
      Scalars<double> own{};
      for (const Chunk* chunk = begin; chunk != end; ++chunk) {
        const bool whole = chunk->n == plan.members[chunk->member].numel;
        if (whole) prepare(plan, inputs, chunk->member, cache, own);
        take_chunk(plan, *chunk, whole ? own : scalars_[chunk->member], inputs.hypers, ending);
      }
    });
  }

  void take_chunk(const Plan& plan, const Chunk& chunk, const Scalars<double>& r, const std::vector<Hyper>& hypers,
                  const std::vector<bool>& ending) {
    const Member& m = plan.members[chunk.member];
    if (m.grad != nullptr) {
      const bool mean_is_taken =
          m.scalar >= 0 && ending[m.scalar] && plan.policies[m.scalar].source == Source::gradient;
      const int mode = mode_of(m) & ~(mean_is_taken ? kAddsMean : 0);
      if (m.dtype == DType::f64) {
        update_chunk<double>(plan, m, chunk, mode, r);
      } else {
        update_chunk<float>(plan, m, chunk, mode, r);
      }
    }
    if (m.active < 0 || !ending[m.active]) return;
    const Hyper& hyper = hypers[m.group];
    const Policy& policy = plan.policies[m.active];
    end_chunk(m, chunk, policy, hyper, end_in_step(policy, numbers_of(m), m.grad != nullptr, hyper.has_rate()));
  }

  template <class T>
  void update_chunk(const Plan& plan, const Member& m, const Chunk& chunk, int mode, const Scalars<double>& r) {
    const Scalars<T> scalars = r.as<T>();
    const Group& group = plan.groups[m.group];
    const bool stores =
        m.scalar >= 0 && plan.policies[m.scalar].kind == PolicyKind::hypergradient && m.at[kPrevious] != nullptr;
    const bool couples = decay_is_coupled(group, scalars);
    const auto loop = kernels_.loops<T>().step[group.backbone][stores ? kStoresDirection : mode][couples];
    Staged<T>(kernels_, m, chunk, true).each(true, kStaged, [&](const Block<T>& block) { loop(block, scalars); });
  }

  template <class T>
  static void clear(const Member& m, Role role, const Chunk& chunk) {
    std::fill_n(at<T>(m, role, chunk.begin), chunk.n, T(0));
  }

  void end_chunk(const Member& m, const Chunk& chunk, const Policy& policy, const Hyper& hyper, const ActiveEnd& end) {
    if (!end.ends) return;
    if (!end.adjusts) {
      m.dtype == DType::f64 ? clear<double>(m, kGradSum, chunk) : clear<float>(m, kGradSum, chunk);
      return;
    }
    Scalars<double> r{};
    prepare_active(policy, hyper, r);
    if (m.dtype == DType::f64) {
      kernels_.f64.adjust(state_block<double>(m, chunk.begin, chunk.n), r);
    } else {
      kernels_.f32.adjust(state_block<float>(m, chunk.begin, chunk.n), r.as<float>());
    }
  }

  // Hypergradient: adapts the gains to <g, u_prev>. This is done before the update of any tensor.
  void follow_slope(Plan& plan, const Policy& policy, const StepInputs& inputs) {
    ScalarsCache cache;
    std::vector<bool> measured(plan.members.size(), false);
    for (int i : policy.members) {
      const Member& m = plan.members[i];
      const Hyper& hyper = inputs.hypers[m.group];
      const Numbers numbers = numbers_of(m);
      if (!has_slope(numbers, m.grad != nullptr, hyper.has_rate())) continue;
      Scalars<double>& r = scalars_[i];
      r = cache.get(plan.groups[m.group].backbone, m.group, hyper, {numbers.step_count(), 0});
      r.grad_factor = plan.groups[m.group].maximize ? -grad_factor_ : grad_factor_;
      r.weight_decay = hyper.weight_decay;
      measured[i] = true;
    }
    for_chunks([&](const Chunk& chunk) {
      const Member& m = plan.members[chunk.member];
      if (!measured[chunk.member] || plan_policy(plan, m.scalar) != &policy) return;
      const double slope =
          m.dtype == DType::f64 ? slope_chunk<double>(plan, m, chunk) : slope_chunk<float>(plan, m, chunk);
      partials_[&chunk - chunks_.data()] = {slope, 0};
    });
    sum_products(plan, measured);
    for (int i : policy.members) {
      outcomes_[i] = outcome_of_slope(products_[i], measured[i], inputs.hypers[plan.members[i].group].lr);
    }
    adapt_gains(plan, policy, inputs.hypers);
  }

  // Adapts the gains of a policy to its measured outcomes.
  void adapt_gains(const Plan& plan, const Policy& policy, const std::vector<Hyper>& hypers) {
    for_units(policy, [&](const int* begin, const int* end) {
      Outcome unit = {{0, 0}, 0, false, false};
      for (const int* i = begin; i != end; ++i) add_outcome(unit, outcomes_[*i]);
      for (const int* i = begin; i != end; ++i) {
        const Member& m = plan.members[*i];
        adapt_gain(policy, unit, hypers[m.group].lr_scale, *numbers_of(m).gain, outcomes_[*i]);
      }
    });
  }

  template <class T>
  double slope_chunk(const Plan& plan, const Member& m, const Chunk& chunk) {
    const Scalars<T> scalars = scalars_[chunk.member].as<T>();
    const Group& group = plan.groups[m.group];
    const Loops<T>& loops = kernels_.loops<T>();
    const auto loop = m.at[kPrevious] != nullptr ? loops.slope_stored : loops.slope_of_state[group.backbone];
    double slope = 0;
    Staged<T>(kernels_, m, chunk, true).each(false, kChunk, [&](const Block<T>& block) {
      slope = loop(block, scalars, decay_is_coupled(group, scalars));
    });
    return slope;
  }

  // TrainableLR's interval end: measures inner products, then adapts the gains. before: the inputs of the current step
  // if it is not counted yet, or null. Returns for each member whether it was measured.
  std::vector<bool> adapt(Plan& plan, const Policy& policy, const std::vector<Hyper>& hypers,
                          const StepInputs* before) {
    std::vector<bool> measured(plan.members.size(), false);
    for (int i : policy.members) {
      const Member& m = plan.members[i];
      uncounted_[i] = {before != nullptr && m.grad != nullptr,
                       before != nullptr ? hypers[m.group].lr * rate_factor_of(m, *before) : 0};
      measured[i] = is_measurable(policy, numbers_of(m), uncounted_[i]);
    }
    for_chunks([&](const Chunk& chunk) {
      const Member& m = plan.members[chunk.member];
      if (!measured[chunk.member] || plan_policy(plan, m.scalar) != &policy) return;
      partials_[&chunk - chunks_.data()] = m.dtype == DType::f64 ? measure_chunk<double>(plan, m, chunk, policy)
                                                                 : measure_chunk<float>(plan, m, chunk, policy);
    });
    sum_products(plan, measured);
    for (int i : policy.members) {
      const Member& m = plan.members[i];
      const Numbers numbers = numbers_of(m);
      const double lr = before != nullptr || numbers.lr_last == nullptr ? hypers[m.group].lr : *numbers.lr_last;
      outcomes_[i] = outcome_of_interval(policy, numbers, products_[i], uncounted_[i], lr);
    }
    adapt_gains(plan, policy, hypers);
    const auto restarts = [&](int i) { return outcomes_[i].restarts; };
    if (std::none_of(policy.members.begin(), policy.members.end(), restarts)) return measured;
    for_chunks([&](const Chunk& chunk) {
      const Member& m = plan.members[chunk.member];
      if (plan_policy(plan, m.scalar) != &policy || !outcomes_[chunk.member].restarts) return;
      const int64_t size = m.dtype == DType::f64 ? 8 : 4;
      std::memset(static_cast<char*>(m.at[kPrevious]) + chunk.begin * size, 0, static_cast<size_t>(chunk.n * size));
    });
    return measured;
  }

  template <class T>
  Products measure_chunk(const Plan& plan, const Member& m, const Chunk& chunk, const Policy& policy) {
    const double factor = plan.groups[m.group].maximize ? -grad_factor_ : grad_factor_;
    const Numbers numbers = numbers_of(m);
    const Uncounted& uncounted = uncounted_[chunk.member];
    const Measure<T> by = {static_cast<T>(applied_steps(numbers, uncounted)),
                           static_cast<T>(*numbers.gain * lr_sum(numbers, uncounted)), static_cast<T>(factor)};
    const auto loop = kernels_.loops<T>().measure[static_cast<int>(policy.source)];
    Products found = {0, 0};
    Staged<T>(kernels_, m, chunk, uncounted.applies).each(false, kChunk, [&](const Block<T>& block) {
      found = loop(block, by);
    });
    return found;
  }

  // Starts a new interval: sets its sums to 0 and interval_start to the parameters. For measured tensors the
  // measurement has done so already.
  void begin_trainable(Plan& plan, const Policy& policy, const std::vector<bool>& measured) {
    for_chunks([&](const Chunk& chunk) {
      const Member& m = plan.members[chunk.member];
      if (measured[chunk.member] || plan_policy(plan, m.scalar) != &policy) return;
      m.dtype == DType::f64 ? begin_chunk<double>(m, chunk) : begin_chunk<float>(m, chunk);
    });
    for (int i : policy.members) restart_trainable(numbers_of(plan.members[i]));
  }

  template <class T>
  void begin_chunk(const Member& m, const Chunk& chunk) {
    if (m.at[kMeanSum] != nullptr) clear<T>(m, kMeanSum, chunk);
    if (m.at[kStart] == nullptr) return;
    load_weights(kernels_.loops<T>(), m, chunk.begin, chunk.n, at<T>(m, kStart, chunk.begin));
  }

  void sum_products(const Plan& plan, const std::vector<bool>& measured) {
    products_.assign(measured.size(), {0, 0});
    for (size_t i = 0; i < measured.size(); ++i) {
      if (measured[i]) products_[i] = sum_chunks(partials_.data() + first_chunk_[i], chunks_of(plan.members[i].numel));
    }
    sum_over_ranks(plan, products_);
  }

  const Kernels& kernels_;
  std::vector<Chunk> chunks_;
  std::vector<int64_t> bins_, first_chunk_;
  std::vector<int> not_whole_;  // members with no chunk or with several
  bool rounds_ = false;
  std::vector<Products> partials_, products_;
  std::vector<Outcome> outcomes_;     // by member
  std::vector<Uncounted> uncounted_;  // by member
  std::vector<Scalars<double>> scalars_;
  double grad_factor_ = 1;
};

}  // namespace

}  // namespace fused_adaptive::cpu

namespace fused_adaptive {
std::unique_ptr<Executor> make_cpu_executor(const Plan& plan) { return std::make_unique<cpu::CpuExecutor>(plan); }
}  // namespace fused_adaptive
