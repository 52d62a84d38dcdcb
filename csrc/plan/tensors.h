// Plan of torch tensors. It keeps only their addresses: between steps it does not own parameters or state, so other
// code may swap, free or share them. tensors.cpp builds the plan, checks.cpp has the checks of every step.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"

// Torch's own macros add the location in the source to the message, which does not help users.
#define FA_CHECK(condition, ...) \
  if (!(condition)) fused_adaptive::fail(__VA_ARGS__)
#define FA_TORCH(call) FA_CHECK((call) == AOTI_TORCH_SUCCESS, "torch cannot do " #call)

namespace fused_adaptive {

using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fused_adaptive: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Returns everything that fused_adaptive/core/declarations.py declares, as text. Operators take positions in these
// tables instead of names, since torch's stable interface does not free string arguments.
std::string declarations();

bool dtype_of(AtenTensorHandle tensor, DType& dtype);
bool is_float(DType dtype);
bool same_device(const Tensor& tensor, int32_t type, int32_t index);

// Properties of a tensor, read through a C interface.
struct View {
  const void* at = nullptr;
  std::optional<DType> dtype;  // none: no kernel supports it
  int32_t device_type = 0, device_index = 0;
  int64_t dims = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
};

// Deleter of memory of torch's allocator: it owns the tensor that owns the memory.
struct OfTensor {
  Tensor tensor;
  void operator()(void*) const {}
};

// Result of the checks before a step: whether the step can be taken, or what Python has to do before.
enum Readiness : int64_t {
  kReady = 0,
  kGradients = 1,  // a gradient cannot be used as it is
  kStale = 2,      // addresses have changed or state is missing: rebuild the plan
};

class TensorPlan {
 public:
  // backbones, coupled and maximize have one entry per param group; groups and indices one per parameter.
  TensorPlan(std::vector<Tensor> params, const std::vector<int64_t>& groups, const std::vector<int64_t>& indices,
             const std::vector<int64_t>& backbones, const std::vector<int64_t>& coupled,
             const std::vector<int64_t>& maximize, bool on_device);

  // Sets the tensors of one role for some of the parameters.
  void bind(int64_t role, const std::vector<int64_t>& members, const std::vector<Tensor>& tensors);
  // Marks parameters whose momentum buffers are not initialized: their first step writes them.
  void mark_first(const std::vector<int64_t>& members);
  // Marks parameters that have no memory and no gradient at present. The tensors passed for them give only shapes, and
  // they may lack the state that only an update uses.
  void mark_parked(const std::vector<int64_t>& members);
  // Sets the seeds of stochastic rounding, one per param group.
  void set_seeds(const std::vector<int64_t>& seeds);
  void add_policy(int64_t kind, const std::vector<int64_t>& members, const std::vector<double>& arguments);
  // Sets how inner products of shards are summed. `products` is float64 of shape (members, 2) on the parameters'
  // device; sum() sums it in place over the ranks. sum must live as long as the plan.
  void share(Tensor products, void (*sum)());
  // Checks the plan and makes it ready for steps.
  void finish();
  // Sets which addresses a check prefetches: of the TensorImpl and the StorageImpl of each tensor, in the order of
  // look_at(). They are not read, so the objects may have gone.
  void prefetch_from(const std::vector<int64_t>& addresses);

  // Checks before a step. For each member, call look_at() on its parameter and then on its state in the order of
  // binding; then call take(), leave_out() or refuse(). The caller keeps the gradients alive until the step is done, or
  // passes them to keep().
  void begin_check();
  size_t tensors_of(size_t member) const { return first_place_[member + 1] - first_place_[member]; }
  void look_at(size_t member, size_t number, const View& tensor);
  void take(size_t member, const View& grad);
  void leave_out(size_t member) { plan_.members[member].grad = nullptr; }
  void refuse() { are_usable_ = false; }  // for a gradient that cannot be used as it is
  Readiness end_check();
  void keep(std::vector<Tensor> grads) { grads_ = std::move(grads); }
  size_t size() const { return plan_.members.size(); }

  // random_rates: int64 tensor with the fields of RandomRates, or none without ASLR.
  Traces step(const std::vector<double>& hypers, const std::optional<Tensor>& random_rates,
              const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
              const std::vector<Tensor>& lrs = {}, const std::vector<int64_t>& lr_groups = {});
  Traces end_interval(const std::vector<double>& hypers);
  // Returns the memory of torch's allocator that the plan uses on a GPU besides parameters, state and gradients.
  std::vector<Tensor> memory() const;
  // Returns the members whose momentum buffers have no value yet. Waits for a GPU if only it knows them.
  std::vector<int64_t> unfilled() const { return plan_.executor->unfilled(plan_); }

 private:
  struct Bound {
    int member;
    Role role;
    Tensor tensor;
  };
  // Dtype, sizes and strides of a parameter when the plan was built.
  struct Extents {
    DType dtype = DType::f32;
    int64_t dims = 0;
    size_t at = 0;  // position in extents_: sizes, then strides
    bool parked = false;
  };

  struct Objects {
    const char *tensor, *storage;
  };

  void note_extents();
  void check_complete(size_t member) const;
  std::vector<Hyper> hypers_of(const std::vector<double>& numbers) const;
  bool has_extents(size_t member, const View& tensor) const;
  DeviceNumber device_number(const Tensor& tensor, const char* name) const;

  Plan plan_;
  std::vector<Tensor> params_;  // until the plan is finished
  std::vector<Bound> bound_;    // until the plan is finished
  std::vector<Tensor> grads_, shared_;
  std::vector<const void*> places_;  // by member: address of its parameter, then of its state; null for empty tensors
  std::vector<Objects> objects_;     // by place, to be prefetched; or empty
  std::vector<size_t> first_place_;  // by member: position in places_; then the size of places_
  std::vector<Extents> extents_of_;  // by member
  std::vector<int64_t> extents_;
  int32_t device_type_ = 0, device_index_ = 0;
  int64_t overwritten_ = -1;  // member whose gradient is the parameter itself
  bool on_device_ = false, are_usable_ = false, lacks_state_ = false, is_stale_ = false, is_ready_ = false;
};

// Returns the plan with this number (ops.cpp).
std::shared_ptr<TensorPlan> plan_of(int64_t number);

// Returns the addresses of read_gradients, are_same and are_same_items, which Python calls (python.cpp).
std::vector<int64_t> python_calls();

}  // namespace fused_adaptive
