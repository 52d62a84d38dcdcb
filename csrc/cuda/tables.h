// Data in device memory and in kernel arguments, shared by host and device.
#pragma once

#include "plan/plan.h"
#include "rules/intervals.h"

namespace fused_adaptive::cuda {

constexpr int kThreads = 256;
// Elements in a chunk of an update: a multiple of every vector length. Smaller than the chunks of inner products, so
// that blocks finish at about the same time.
constexpr int64_t kUpdateChunk = 8192;

// Parameter. All pointers are to device memory: if counts are on the host, pointers of counts are to a Mirror.
struct Tensor {
  void* at[kElementRoles];
  Numbers numbers;
  int64_t numel, index, seed;
  int32_t group, active, scalar;
  bool adapts, maximize, coupled;
  bool aligned;           // every address is a multiple of 16
  bool stores_direction;  // Hypergradient cannot compute the direction from the state
  bool state_is_double;
};

// Copy on the device of a parameter's counts on the host. Kernels and host count separately, so only changes by other
// code are uploaded. SGD has no step count; its step is 0 before the first update of the momentum buffer.
struct Mirror {
  double step;
  int64_t active_step, active_applied, tlr_step, tlr_applied, tlr_applied_prev, direction_valid, rounding_step;
  double mu_product;
};

// Policy. Its tensors have equal counts, so kernels read those of the first tensor.
struct DeviceRule : Rule {
  int32_t first_tensor;  // -1: no tensors
};

// Chunk of one tensor: 64-bit base, 32-bit offsets from it.
struct Chunk {
  int64_t base;
  int32_t tensor, count;
};

// Blocks draw tickets for chunks, so that they work on adjacent memory at the same time and finish at about the same
// time, even if multiprocessors differ in speed.
struct Turns {
  int64_t count;      // number of chunks
  uint32_t* tickets;  // number of drawn tickets; 0 before and after a launch
};

// Up to kGroup partial sums of one tensor, which one thread adds.
struct PartialGroup {
  int64_t first;
  int64_t count;
};

// Tensor of a policy and the position of its group sums.
struct Share {
  int32_t tensor;
  int32_t group_count;
  int64_t first_group;
};

constexpr int kNearHypers = 32;
// Powers of the betas that the host computes for tensors of a param group with step count t.
struct GivenPowers {
  double t = -1;  // -1: none
  Powers powers = {};
};
// Arguments of all kernels of a step.
struct Step {
  const Tensor* tensors;
  int32_t tensor_count;
  const DeviceRule* rules;
  const void* const* grads;         // by tensor; null for tensors without a gradient, and in end_interval()
  const RandomRates* random_rates;  // null: none
  DeviceNumber grad_scale;
  const float* found_inf;
  const DeviceNumber* lrs;  // by param group: an lr that is a tensor; no address: lr is in the hyperparameters
  const Hyper* far_hypers;  // by param group, if there are more than kNearHypers; else null
  Hyper hypers[kNearHypers];
  GivenPowers powers[kNearHypers];  // not set if far_hypers are used
};

// Time of a measurement. before_update: tlr_step does not include the current step. after_update: it does. now: in
// end_interval(), whatever tlr_step is.
enum class When : int { before_update, after_update, now };

// Arguments of one launch.
struct Launch {
  const Chunk* chunks;
  Turns turns;
  uint32_t* finished_blocks;  // of all launches that have one last block
  uint32_t blocks;            // number of blocks of those launches
  // For inner products of one policy.
  int32_t rule;
  When when;
  Products *partials, *group_sums;  // partials: of the chunks of this launch
  Products* all_partials;           // of the chunks of all launches
  const PartialGroup* groups;
  int64_t group_count;
  const Share* shares;
  Outcome* outcomes;
  int32_t share_count;
  Products* products;  // by tensor, if tensors are sharded: the finish kernel continues after the sum over ranks
};

using Kernel = void (*)(Step, Launch);

// Bytes that are uploaded in kernel arguments, so no host memory has to outlive the call. Drivers before CUDA 12.1 take
// at most 4 KB of arguments.
template <int kBytes>
struct Parcel {
  uint64_t* to;
  int64_t words;
  uint64_t data[kBytes / 8 - 2];
  static constexpr int64_t kWords = kBytes / 8 - 2;
};
using SmallParcel = Parcel<4096>;
using LargeParcel = Parcel<32760>;

}  // namespace fused_adaptive::cuda
