// What the kernels find in device memory and in their arguments: plain data, shared by host and device.
#pragma once

#include "plan/plan.h"
#include "rules/intervals.h"

namespace fused_adaptive::cuda {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 2048 / kThreads;  // on a multiprocessor
// Elements that an update takes at a time. A multiple of every vector's length; smaller than the chunks of inner
// products, so that blocks finish together.
constexpr int64_t kUpdateChunk = 8192;

// A parameter. Every pointer is the device's: where the plan counts on the host, those of counts are to a Mirror.
struct Tensor {
  void* at[kElementRoles];
  Numbers numbers;
  int64_t numel, index, seed;
  int32_t group, active, scalar;
  bool adapts, maximize, coupled;
  bool aligned;           // every address is a multiple of 16
  bool stores_direction;  // Hypergradient cannot tell it from the state
  bool state_is_double;
};

// The counts of a parameter that live on the host, on the device. The kernels count here, the host counts there, and
// only a change from outside has to be carried over. An SGD has no count of its own: 0 is "no buffer yet".
struct Mirror {
  double step;
  int64_t active_step, active_applied, tlr_step, tlr_applied, tlr_applied_prev, direction_valid, rounding_step;
};

// A policy. Its tensors count alike, so that the first stands for all.
struct DeviceRule : Rule {
  int32_t first_tensor;  // -1: it has none
};

// A chunk of one tensor: 64-bit base, 32-bit offsets inside.
struct Chunk {
  int64_t base;
  int32_t tensor, count;
};

// Which chunks a block takes: a range of neighbours, so that it changes tensors as rarely as possible; every
// gridDim-th; or the next that no block has taken.
enum class Order : int { ranges, interleaved, ticket };
struct Turns {
  int64_t count;  // of chunks
  Order order;
  uint32_t* next;  // for tickets; 0 before a launch, and after it
};

// kGroup partial sums, or what is left of a tensor's: they are added by one thread.
struct PartialGroup {
  int64_t first;
  int64_t count;
};

// A policy's tensor: where its sums are, and what comes of them.
struct Share {
  int32_t tensor;
  int32_t group_count;
  int64_t first_group;
};

// What all kernels of a step have in common.
constexpr int kNearHypers = 32;
// What the host has raised to a power for a group's tensors that take this step. -1: nothing.
struct GivenPowers {
  double t = -1;
  Powers powers = {};
};
struct Step {
  const Tensor* tensors;
  int32_t tensor_count;
  const DeviceRule* rules;
  const void* const* grads;         // of each tensor; null outside of a step, and for one that does not take part
  const RandomRates* random_rates;  // null: none
  DeviceNumber grad_scale;
  const float* found_inf;
  const DeviceNumber* lrs;  // of each group: an lr that is a tensor; none: it is in the hyperparameters
  const Hyper* far_hypers;  // of each group, if they are more than fit here
  Hyper hypers[kNearHypers];
  GivenPowers powers[kNearHypers];  // nothing, if far_hypers are used
};

// When a measurement takes place: its interval ends if tlr_step, plus what is not counted yet, has reached it.
enum class When : int { before_update, after_update, now };

// What one kernel has to do, and what its last block has.
struct Launch {
  const Chunk* chunks;
  Turns turns;
  uint32_t* ticket;  // drawn by every block of the launches that finish together
  uint32_t blocks;   // those launches' blocks
  // Inner products, of one policy.
  int32_t rule;
  When when;
  Products *partials, *group_sums;  // partials: of this launch's chunks
  Products* all_partials;           // of all launches
  const PartialGroup* groups;
  int64_t group_count;
  const Share* shares;
  Outcome* outcomes;
  int32_t share_count;
  Products* products;  // of each tensor, where other ranks hold parts of it: then the finish kernel goes on
};

using Kernel = void (*)(Step, Launch);

// Bytes that travel in a kernel's arguments, and so need no host memory that outlives the call. Drivers before CUDA
// 12.1 take 4 KB.
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
