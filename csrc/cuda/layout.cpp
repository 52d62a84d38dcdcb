#include "layout.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "kernels.h"
#include "plan/members.h"

namespace fused_adaptive::cuda {
namespace {

// Appends the chunks of a tensor.
void add_chunks(std::vector<Chunk>& chunks, const Plan& plan, int member, int64_t size) {
  const int64_t numel = plan.members[member].numel;
  for (int64_t base = 0; base < numel; base += size) {
    chunks.push_back({base, member, static_cast<int32_t>(std::min(size, numel - base))});
  }
}

Kernel update_kernel(int backbone, int mode, bool coupled, DType dtype) {
  switch (dtype) {
    case DType::f64:
      return update_kernel_f64(backbone, mode, coupled);
    case DType::bf16:
      return update_kernel_bf16(backbone, mode, coupled);
    case DType::f16:
      return update_kernel_f16(backbone, mode, coupled);
    default:
      return update_kernel_f32(backbone, mode, coupled);
  }
}

bool is_aligned(const Member& m) {
  return std::all_of(m.at.begin(), m.at.begin() + kElementRoles,
                     [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; });
}

bool is_hypergradient(const Plan& plan, const Member& m) {
  return m.scalar >= 0 && plan.policies[m.scalar].kind == PolicyKind::hypergradient;
}

DeviceRule device_rule_of(const Policy& policy) { return {policy, policy.members.empty() ? -1 : policy.members[0]}; }

// Until all tables are sent, a pointer holds an offset into the packer.
template <class E>
void to_pointer(const E*& pointer, const Buffer& memory) {
  pointer = memory.at<E>(reinterpret_cast<size_t>(pointer));
}
template <class E>
const E* as_offset(size_t offset) {
  return reinterpret_cast<const E*>(offset);
}

// Points counts to those of a mirror. Its address is on the device, so the host must not read it.
void point_to(Mirror& mirror, Numbers& numbers) {
  const auto point = [](int64_t*& number, int64_t& to) {
    if (number != nullptr) number = &to;
  };
  point(numbers.active_step, mirror.active_step);
  point(numbers.active_applied, mirror.active_applied);
  point(numbers.tlr_step, mirror.tlr_step);
  point(numbers.tlr_applied, mirror.tlr_applied);
  point(numbers.tlr_applied_prev, mirror.tlr_applied_prev);
  point(numbers.direction_valid, mirror.direction_valid);
  point(numbers.rounding_step, mirror.rounding_step);
  if (numbers.mu_product != nullptr) numbers.mu_product = &mirror.mu_product;
}

}  // namespace

Mirror mirror_of(const Member& m) {
  const auto counted = [&](Role role) { return m.at[role] != nullptr ? count(m, role) : 0; };
  Mirror mirror = {};
  mirror.step = m.at[kStep] != nullptr ? numbers_of(m).step_count() : (m.first || m.at[kState0] == nullptr ? 0 : 1);
  mirror.active_step = counted(kActiveStep);
  mirror.active_applied = counted(kActiveApplied);
  mirror.tlr_step = counted(kTlrStep);
  mirror.tlr_applied = counted(kTlrApplied);
  mirror.tlr_applied_prev = counted(kTlrAppliedPrev);
  mirror.direction_valid = counted(kDirectionValid);
  mirror.rounding_step = counted(kRoundingStep);
  mirror.mu_product = numbers_of(m).product();
  return mirror;
}

Layout::Layout(const Plan& plan, const std::vector<bool>& couples, Mirror* mirrors, bool on_device, int device,
               cudaStream_t stream)
    : device_(device), stream_(stream) {
  add_tensors(plan, couples, mirrors, on_device);
  std::vector<DeviceRule> table;
  for (const Policy& policy : plan.policies) table.push_back(device_rule_of(policy));
  rules = as_offset<DeviceRule>(packer_.add(table));
  build_buckets(plan, couples);
  build_units(plan);
  build_scratch(plan);
  packer_.send(tables_, device_, stream_);
  packer_ = Packer();
  to_pointer(tensors, tables_);
  to_pointer(rules, tables_);
  for (Bucket& bucket : buckets) to_pointer(bucket.chunks, tables_);
  for (Unit& unit : units) {
    to_pointer(unit.groups, tables_);
    to_pointer(unit.shares, tables_);
    for (Measurement& measurement : unit.launches) to_pointer(measurement.chunks, tables_);
  }
}

void Layout::add_tensors(const Plan& plan, const std::vector<bool>& couples, Mirror* mirrors, bool on_device) {
  std::vector<Tensor> table;
  for (size_t i = 0; i < plan.members.size(); ++i) {
    const Member& m = plan.members[i];
    const Group& group = plan.groups[m.group];
    Tensor x = {};
    std::copy_n(m.at.begin(), static_cast<int>(kElementRoles), x.at);
    x.numbers = numbers_of(m);
    if (!on_device) point_to(mirrors[i], x.numbers);
    if (m.at[kStep] == nullptr || !on_device) {
      x.numbers.step = &mirrors[i].step;
      x.numbers.step_is_double = true;
    }
    x.seed = m.seed;
    x.numel = m.numel;
    x.index = m.index;
    x.group = m.group;
    x.active = m.active;
    x.scalar = m.scalar;
    x.adapts = m.adapts;
    x.maximize = group.maximize;
    x.coupled = couples[m.group];
    x.aligned = is_aligned(m);
    x.stores_direction = is_hypergradient(plan, m) && m.at[kPrevious] != nullptr;
    x.state_is_double = m.dtype == DType::f64;
    table.push_back(x);
  }
  tensors = as_offset<Tensor>(packer_.add(table));
}

void Layout::build_buckets(const Plan& plan, const std::vector<bool>& couples) {
  std::map<std::tuple<int, int, bool, DType>, std::vector<int>> parts;
  for (size_t i = 0; i < plan.members.size(); ++i) {
    const Member& m = plan.members[i];
    parts[{plan.groups[m.group].backbone, mode_of(m), couples[m.group], m.dtype}].push_back(static_cast<int>(i));
  }
  for (const auto& [key, members] : parts) {
    const auto [backbone, mode, coupled, dtype] = key;
    std::vector<Chunk> chunks;
    for (int member : members) add_chunks(chunks, plan, member, kUpdateChunk);
    // Empty tensors need no launch. If there are no other tensors, one launch counts their steps.
    if (chunks.empty() && (!buckets.empty() || &members != &parts.rbegin()->second)) continue;
    const Kernel kernel = update_kernel(backbone, mode, coupled, dtype);
    const int64_t count = static_cast<int64_t>(chunks.size());
    buckets.push_back({kernel, as_offset<Chunk>(packer_.add(chunks)), count, grid_size(kernel, count, device_), dtype,
                       (mode & kScalesElements) != 0});
  }
}

void Layout::build_units(const Plan& plan) {
  for (size_t rule = 0; rule < plan.policies.size(); ++rule) {
    const Policy& policy = plan.policies[rule];
    Unit unit;
    unit.rule = static_cast<int>(rule);
    if (policy.kind != PolicyKind::active && !policy.members.empty()) {
      std::map<std::pair<int, DType>, std::vector<int>> parts;
      for (int member : policy.members) {
        const Member& m = plan.members[member];
        const bool slopes = policy.kind == PolicyKind::hypergradient;
        parts[{slopes ? plan.groups[m.group].backbone : -1, m.dtype}].push_back(member);
      }
      std::map<int, int64_t> first_partial;  // by member
      int64_t partial = 0;
      for (const auto& [key, members] : parts) {
        std::vector<Chunk> chunks;
        for (int member : members) {
          first_partial[member] = partial + static_cast<int64_t>(chunks.size());
          add_chunks(chunks, plan, member, kChunk);
        }
        if (chunks.empty() && (!unit.launches.empty() || &members != &parts.rbegin()->second)) continue;
        const Kernel kernel = key.first < 0 ? measure_kernel(key.second) : slope_kernel(key.first, key.second);
        const int64_t count = static_cast<int64_t>(chunks.size());
        unit.launches.push_back(
            {kernel, as_offset<Chunk>(packer_.add(chunks)), count, grid_size(kernel, count, device_), partial});
        unit.blocks += unit.launches.back().blocks;
        partial += count;
      }
      std::vector<PartialGroup> groups;
      std::vector<Share> shares;
      for (int member : policy.members) {
        Share share = {member, 0, static_cast<int64_t>(groups.size())};
        const int64_t chunks = chunks_of(plan.members[member].numel);
        for (int64_t begin = 0; begin < chunks; begin += kGroup) {
          groups.push_back({first_partial[member] + begin, std::min<int64_t>(kGroup, chunks - begin)});
        }
        share.group_count = static_cast<int32_t>(static_cast<int64_t>(groups.size()) - share.first_group);
        shares.push_back(share);
      }
      unit.groups = as_offset<PartialGroup>(packer_.add(groups));
      unit.group_count = static_cast<int64_t>(groups.size());
      unit.shares = as_offset<Share>(packer_.add(shares));
      unit.share_count = static_cast<int32_t>(shares.size());
      most_partials_ = std::max(most_partials_, static_cast<size_t>(partial));
      most_groups_ = std::max(most_groups_, groups.size());
      most_shares_ = std::max(most_shares_, shares.size());
    }
    units.push_back(std::move(unit));
  }
}

void Layout::build_scratch(const Plan& plan) {
  Packer sizes;  // only computes offsets
  const size_t at_counters = sizes.add(std::vector<uint64_t>(1));
  const size_t at_grads = sizes.add(std::vector<const void*>(plan.members.size()));
  const size_t at_hypers = sizes.add(std::vector<Hyper>(plan.groups.size()));
  const size_t at_lrs = sizes.add(std::vector<DeviceNumber>(plan.groups.size()));
  const size_t at_partials = sizes.add(std::vector<Products>(most_partials_));
  const size_t at_groups = sizes.add(std::vector<Products>(most_groups_));
  const size_t at_outcomes = sizes.add(std::vector<Outcome>(most_shares_));
  scratch_.allocate_zeros(device_, sizes.size(), stream_);
  finished_blocks = scratch_.at<uint32_t>(at_counters);
  tickets_ = finished_blocks + 1;
  grads = scratch_.at<const void*>(at_grads);
  hypers = plan.groups.size() > kNearHypers ? scratch_.at<Hyper>(at_hypers) : nullptr;
  lrs = scratch_.at<DeviceNumber>(at_lrs);
  partials = scratch_.at<Products>(at_partials);
  group_sums = scratch_.at<Products>(at_groups);
  outcomes = scratch_.at<Outcome>(at_outcomes);
}

}  // namespace fused_adaptive::cuda
