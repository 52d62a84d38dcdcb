// A plan built from torch tensors, of which it keeps addresses alone: between steps nothing here owns a parameter or
// its state, so that others may swap, free or share them. tensors.cpp builds it; checks.cpp is what every step checks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"

// Torch's own macros put the source's place into the message, which says nothing to a user.
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

// All that fused_adaptive/core/declarations.py declares, as text. Operators take places in these tables for names:
// torch's stable interface does not free strings among their arguments.
std::string declarations();

bool dtype_of(AtenTensorHandle tensor, DType& dtype);
bool is_float(DType dtype);
bool same_device(const Tensor& tensor, int32_t type, int32_t index);

// A tensor, as C interfaces tell of it.
struct View {
  const void* at = nullptr;
  std::optional<DType> dtype;  // none: one that no kernel knows
  int32_t device_type = 0, device_index = 0;
  int64_t dims = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
};

// Deletes memory of torch's allocator: with the tensor that it is of.
struct OfTensor {
  Tensor tensor;
  void operator()(void*) const {}
};

// What the checks before a step come to: whether a step can be taken, or what has to happen in Python before that.
enum Readiness : int64_t {
  kReady = 0,
  kGradients = 1,  // one of them cannot be used as it is
  kStale = 2,      // addresses have changed, or state is missing: build the plan anew
};

class TensorPlan {
 public:
  // One entry of backbones, coupled and maximize a param group, one of groups and indices a parameter.
  TensorPlan(std::vector<Tensor> params, const std::vector<int64_t>& groups, const std::vector<int64_t>& indices,
             const std::vector<int64_t>& backbones, const std::vector<int64_t>& coupled,
             const std::vector<int64_t>& maximize, bool on_device);

  // The tensors of one role, for some of the parameters.
  void bind(int64_t role, const std::vector<int64_t>& members, const std::vector<Tensor>& tensors);
  // These parameters' momentum buffers hold nothing yet: their first step writes them.
  void mark_first(const std::vector<int64_t>& members);
  // These parameters have no memory at present, and no gradient: the tensors that stand for them tell their shape.
  void mark_parked(const std::vector<int64_t>& members);
  // Of stochastic rounding, one a group.
  void set_seeds(const std::vector<int64_t>& seeds);
  void add_policy(int64_t kind, const std::vector<int64_t>& members, const std::vector<double>& arguments);
  // Other ranks hold parts of the parameters: sum() makes the inner products of parts in `products`, float64 (members,
  // 2) on the parameters' device, those of the whole. It must live as long as the plan.
  void share(Tensor products, void (*sum)());
  // Checks the whole and makes it ready for steps.
  void finish();

  // Before a step. For each member look_at() its parameter and then its state, in the order of their binding; then
  // take(), leave_out() or refuse(). Who gives the gradients keeps them alive until the step is done, or has the plan
  // do it.
  void begin_check();
  size_t tensors_of(size_t member) const { return first_place_[member + 1] - first_place_[member]; }
  void look_at(size_t member, size_t number, const View& tensor);
  void take(size_t member, const View& grad);
  void leave_out(size_t member) { plan_.members[member].grad = nullptr; }
  void refuse() { are_usable_ = false; }  // a gradient that is nothing to take
  Readiness end_check();
  void keep(std::vector<Tensor> grads) { grads_ = std::move(grads); }
  size_t size() const { return plan_.members.size(); }

  // draw: ASLR's, as RandomRates has it, or none.
  Traces step(const std::vector<double>& hypers, const std::optional<Tensor>& random_rates,
              const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
              const std::vector<Tensor>& lrs = {}, const std::vector<int64_t>& lr_groups = {});
  Traces end_interval(const std::vector<double>& hypers);
  // What of torch's memory on a GPU it uses besides parameters, state and gradients.
  std::vector<Tensor> memory() const;

 private:
  struct Bound {
    int member;
    Role role;
    Tensor tensor;
  };
  // A parameter's dtype, sizes and strides, as they were when the plan was built.
  struct Extents {
    DType dtype = DType::f32;
    int64_t dims = 0;
    size_t at = 0;  // in extents_: sizes, then strides
    bool parked = false;
  };

  void note_extents();
  void check_complete(const Member& member) const;
  std::vector<Hyper> hypers_of(const std::vector<double>& numbers) const;
  bool has_extents(size_t member, const View& tensor) const;
  DeviceNumber device_number(const Tensor& tensor, const char* name) const;

  Plan plan_;
  std::vector<Tensor> params_;  // until the plan is finished
  std::vector<Bound> bound_;    // likewise
  std::vector<Tensor> grads_, shared_;
  std::vector<const void*> places_;  // by member: a parameter's address, then its state's; null if it is empty
  std::vector<size_t> first_place_;  // of each member, and the end
  std::vector<Extents> extents_of_;  // of each member
  std::vector<int64_t> extents_;
  int32_t device_type_ = 0, device_index_ = 0;
  int64_t overwritten_ = -1;  // the member whose gradient is the parameter itself
  bool on_device_ = false, are_usable_ = false, lacks_state_ = false, is_stale_ = false, is_ready_ = false;
};

// The plan that has this number (ops.cpp).
std::shared_ptr<TensorPlan> plan_of(int64_t number);

// The addresses of read_gradients, are_same and are_same_items, for Python to call (python.cpp).
std::vector<int64_t> python_calls();

}  // namespace fused_adaptive
