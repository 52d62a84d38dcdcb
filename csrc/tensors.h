// A plan with the torch tensors that it stands on. tensors.cpp builds it; checks.cpp is what every step checks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "plan.h"

namespace fused_adaptive {

using torch::stable::Tensor;

bool dtype_of(AtenTensorHandle tensor, DType& dtype);
bool is_float(DType dtype);
bool same_device(const Tensor& tensor, int32_t type, int32_t index);

// A gradient, as C interfaces tell of it.
struct Gradient {
  const void* at = nullptr;
  DType dtype = DType::f32;
  int32_t device_type = 0, device_index = 0;
  int64_t dims = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
};

// What the checks before a step come to: whether a step can be taken, or what has to happen in Python before that.
enum Outcome : int64_t {
  kReady = 0,
  kGradients = 1,  // one of them cannot be used as it is
  kStale = 2,      // addresses have changed, or state is missing: build the plan anew
};

class TensorPlan {
 public:
  // One entry of backbones, coupled and maximize a param group, one of groups and indices a parameter.
  TensorPlan(std::vector<Tensor> params, const std::vector<int64_t>& groups, const std::vector<int64_t>& indices,
             const std::vector<std::string>& backbones, const std::vector<int64_t>& coupled,
             const std::vector<int64_t>& maximize, bool on_device);

  // The tensors of one role, for some of the parameters.
  void bind(const std::string& role, const std::vector<int64_t>& members, const std::vector<Tensor>& tensors);
  // These parameters' momentum buffers hold nothing yet: their first step writes them.
  void mark_first(const std::vector<int64_t>& members);
  // Of stochastic rounding, one a group.
  void set_seeds(const std::vector<int64_t>& seeds);
  void add_policy(const std::string& kind, const std::vector<int64_t>& members, const std::vector<double>& arguments);
  // Other ranks hold parts of the parameters: sum() makes the inner products of parts in `products`, float64 (members,
  // 2) on the parameters' device, those of the whole. It must live as long as the plan.
  void share(Tensor products, void (*sum)());
  // Checks the whole and makes it ready for steps.
  void finish();

  // Before a step: whether it can be taken; nothing if take_gradients() gives up, which it says by returning false. For
  // each member it calls take(), leave_out() or refuse(): on this thread, while others look whether parameters and
  // state are what and where they were. Who gives the gradients keeps them alive until the step is done, or has the
  // plan do it.
  std::optional<Outcome> check(const std::function<bool()>& take_gradients);
  void take(size_t member, const Gradient& grad);
  void leave_out(size_t member) { plan_.members[member].grad = nullptr; }
  void refuse() { are_usable_ = false; }  // a gradient that is nothing to take
  // Whether a step can be taken with the gradients so far, unless something has moved.
  bool are_usable() const { return are_usable_ && !lacks_state_ && overwritten_ < 0; }
  void keep(std::vector<Tensor> grads) { grads_ = std::move(grads); }
  // Fetches what a parameter is about to be asked for. GCC would drop such calls as having no effect: inlined by force.
  FA_INLINE void prefetch(size_t member) const { __builtin_prefetch(object_of(places_[first_place_[member]])); }
  size_t size() const { return params_.size(); }

  void step(const std::vector<double>& hypers, const std::optional<Tensor>& draws,
            const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
            const std::vector<Tensor>& lrs = {}, const std::vector<int64_t>& lr_groups = {});
  void end_interval(const std::vector<double>& hypers);

 private:
  struct Bound {
    int member;
    Role role;
    Tensor tensor;
  };
  struct Delete {
    void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
  };
  // A parameter or its state, and where it was when the plan was built; null if it is empty. The handles are the plan's
  // own, made one after the other: they lie in memory in the order in which steps ask them.
  struct Place {
    std::unique_ptr<AtenTensorOpaque, Delete> tensor;
    void* at;
  };
  // A parameter's dtype, sizes and strides, as they were when the plan was built.
  struct Extents {
    DType dtype = DType::f32;
    int64_t dims = 0;
    size_t at = 0;  // in extents_: sizes, then strides
  };

  // A torch tensor is one pointer; if it should ever be something else, this is fetched in vain.
  static const char* object_of(const Place& place) { return *reinterpret_cast<const char* const*>(place.tensor.get()); }
  // Fetches what holds() asks of a member's tensors: of the parameter also its sizes, which lie in the middle.
  FA_INLINE void prefetch_places(size_t member) const {
    __builtin_prefetch(object_of(places_[first_place_[member]]) + 64);
    for (size_t i = first_place_[member]; i < first_place_[member + 1]; ++i) {
      __builtin_prefetch(object_of(places_[i]));
      __builtin_prefetch(object_of(places_[i]) + 128);
    }
  }
  void note_extents();
  void check_complete(const Member& member) const;
  bool holds(size_t member) const;
  std::vector<Hyper> hypers_of(const std::vector<double>& numbers) const;
  bool has_extents(size_t member, int64_t dims, const int64_t* sizes, const int64_t* strides) const;
  DeviceNumber device_number(const Tensor& tensor, const char* name) const;

  Plan plan_;
  std::vector<Tensor> params_, grads_, shared_;
  std::vector<Bound> bound_;         // until the plan is finished
  std::vector<Place> places_;        // by member: a parameter, then its state
  std::vector<size_t> first_place_;  // of each member, and the end
  std::vector<Extents> extents_of_;  // of each member
  std::vector<int64_t> extents_;
  int32_t device_type_ = 0, device_index_ = 0;
  int64_t overwritten_ = -1;  // the member whose gradient is the parameter itself
  bool on_device_ = false, are_usable_ = false, lacks_state_ = false, is_ready_ = false;
};

// The plan that has this number (ops.cpp).
std::shared_ptr<TensorPlan> plan_of(int64_t number);

// The addresses of read_gradients, are_same and are_same_items, for Python to call (python.cpp).
std::vector<int64_t> python_calls();

}  // namespace fused_adaptive
