// Division of a plan's tensors into launches: tables on the device, and the part of them that the host keeps.
#pragma once

#include <vector>

#include "runtime.h"

namespace fused_adaptive::cuda {

// Tensors of one update launch. They have the same kernel.
struct Bucket {
  Kernel kernel;
  const Chunk* chunks;
  int64_t count;
  unsigned blocks;
  DType dtype;
  bool scales_elements;
};

// One launch of the inner products of a policy. Its tensors have the same kernel.
struct Measurement {
  Kernel kernel;
  const Chunk* chunks;
  int64_t count;
  unsigned blocks;
  int64_t first_partial;
};

// Inner products of one policy.
struct Unit {
  int rule = 0;
  std::vector<Measurement> launches;
  unsigned blocks = 0;
  const PartialGroup* groups = nullptr;
  int64_t group_count = 0;
  const Share* shares = nullptr;
  int32_t share_count = 0;
};

// Copy of a plan on the device. It changes only with the plan, except for mirrors and scratch memory.
class Layout {
 public:
  // couples: by param group, whether decay is added to the gradient; false without decay, since the parameter could be
  // infinite. mirrors: by member, on the device. stream: torch's current stream.
  Layout(const Plan& plan, const std::vector<bool>& couples, Mirror* mirrors, bool on_device, int device,
         cudaStream_t stream);

  Turns turns(int64_t chunks) const { return {chunks, tickets_}; }

  const Tensor* tensors = nullptr;
  const DeviceRule* rules = nullptr;
  const void** grads = nullptr;
  Hyper* hypers = nullptr;  // null: hyperparameters fit into the kernel arguments
  DeviceNumber* lrs = nullptr;
  uint32_t* finished_blocks = nullptr;
  Products *partials = nullptr, *group_sums = nullptr;
  Outcome* outcomes = nullptr;
  std::vector<Bucket> buckets;
  std::vector<Unit> units;  // by policy; without launches if the policy has no inner products

  std::vector<std::shared_ptr<void>> memory() const { return {tables_.memory(), scratch_.memory()}; }

 private:
  void add_tensors(const Plan& plan, const std::vector<bool>& couples, Mirror* mirrors, bool on_device);
  void build_buckets(const Plan& plan, const std::vector<bool>& couples);
  void build_units(const Plan& plan);
  void build_scratch(const Plan& plan);

  const int device_;
  const cudaStream_t stream_;
  Packer packer_;
  Buffer tables_, scratch_;
  uint32_t* tickets_ = nullptr;
  size_t most_partials_ = 0, most_groups_ = 0, most_shares_ = 0;
};

// Returns the counts of a member on the host.
Mirror mirror_of(const Member& member);

}  // namespace fused_adaptive::cuda
