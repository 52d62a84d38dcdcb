// How a plan's tensors are parted into launches: the tables that live on the device, and what the host keeps of them.
#pragma once

#include <vector>

#include "design.h"
#include "runtime.h"

namespace fused_adaptive::cuda {

// The tensors of one update launch: equal structure.
struct Bucket {
  Kernel kernel;
  const Chunk* chunks;
  int64_t count;
  unsigned blocks;
  DType dtype;
  bool scales_elements;
};

// One launch of a policy's inner products: tensors of one type.
struct Measurement {
  Kernel kernel;
  const Chunk* chunks;
  int64_t count;
  unsigned blocks;
  int64_t first_partial;
};

// All inner products of one policy.
struct Unit {
  int rule = 0;
  std::vector<Measurement> launches;
  unsigned blocks = 0;
  const PartialGroup* groups = nullptr;
  int64_t group_count = 0;
  const Share* shares = nullptr;
  int32_t share_count = 0;
};

// The device's copy of a plan. It is as constant as the plan; only mirrors and scratch memory change.
class Layout {
 public:
  // couples: of each group, whether decay goes into the gradient. Without decay it does not, were the parameter
  // infinite. mirrors: of each member, on the device. The stream is torch's current one.
  Layout(const Plan& plan, const Design& design, const std::vector<bool>& couples, Mirror* mirrors, bool on_device,
         int device, cudaStream_t stream);

  Turns turns(int64_t chunks) const { return {chunks, design_.chunks, next_chunk_}; }

  const Tensor* tensors = nullptr;
  const DeviceRule* rules = nullptr;
  const void** grads = nullptr;
  Hyper* hypers = nullptr;  // null: they fit into the arguments
  DeviceNumber* lrs = nullptr;
  uint32_t* ticket = nullptr;
  Products *partials = nullptr, *group_sums = nullptr;
  Outcome* outcomes = nullptr;
  std::vector<Bucket> buckets;
  std::vector<Unit> units;  // by policy; without launches where it has no inner products

  std::vector<std::shared_ptr<void>> memory() const { return {tables_.memory(), scratch_.memory()}; }

 private:
  void add_tensors(const Plan& plan, const std::vector<bool>& couples, Mirror* mirrors, bool on_device);
  void build_buckets(const Plan& plan, const std::vector<bool>& couples);
  void build_units(const Plan& plan);
  void build_scratch(const Plan& plan);

  const Design design_;
  const int device_;
  const cudaStream_t stream_;
  Packer packer_;
  Buffer tables_, scratch_;
  uint32_t* next_chunk_ = nullptr;
  size_t most_partials_ = 0, most_groups_ = 0, most_shares_ = 0;
};

// What a parameter's counts are on the host.
Mirror mirror_of(const Member& member);

}  // namespace fused_adaptive::cuda
