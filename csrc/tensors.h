// A plan with the torch tensors that it stands on. tensors.cpp builds it; checks.cpp is what every step checks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "plan.h"

namespace fused_adaptive {

using torch::stable::Tensor;

bool dtype_of(const Tensor& tensor, DType& dtype);
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

  // Before a step: no gradients, those of the members that take part, and whether the step can be taken with them. Who
  // gives them keeps them alive until it is done, or has the plan do it.
  void begin();
  void take(size_t member, const Gradient& grad);
  void refuse() { are_usable_ = false; }  // a gradient that is nothing to take
  void keep(std::vector<Tensor> grads) { grads_ = std::move(grads); }
  Outcome check();
  // Fetches what a parameter is about to be asked for. A torch tensor is one pointer; if it should ever be something
  // else, this fetches in vain.
  void prefetch(size_t member) const {
    const char* tensor = *reinterpret_cast<const char* const*>(params_[member].get());
    for (int line = 0; line < 3; ++line) __builtin_prefetch(tensor + 64 * line);
  }
  size_t size() const { return params_.size(); }

  void step(const std::vector<double>& hypers, const std::optional<Tensor>& draws,
            const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
            const std::vector<Tensor>& lrs = {}, const std::vector<int64_t>& lr_groups = {});
  void end_interval();

 private:
  struct Bound {
    int member;
    Role role;
    Tensor tensor;
  };
  // A parameter's sizes and strides, as they were when the plan was built.
  struct Extents {
    int64_t dims = 0;
    size_t at = 0;  // in extents_: sizes, then strides
  };

  void note_extents();
  void check_complete(const Member& member) const;
  bool holds(size_t member) const;
  bool has_extents(size_t member, int64_t dims, const int64_t* sizes, const int64_t* strides) const;
  DeviceNumber device_number(const Tensor& tensor, const char* name) const;

  Plan plan_;
  std::vector<Tensor> params_, grads_, shared_;
  std::vector<Bound> bound_;         // by member, once the plan is finished: a parameter, then its state
  std::vector<size_t> first_bound_;  // of each member, and the end
  std::vector<Extents> extents_of_;  // of each member
  std::vector<int64_t> extents_;
  int32_t device_type_ = 0, device_index_ = 0;
  bool on_device_ = false, are_usable_ = false, is_ready_ = false;
};

// The plan that has this number (ops.cpp).
std::shared_ptr<TensorPlan> plan_of(int64_t number);

// The addresses of read_gradients and are_same, for Python to call (python.cpp).
std::vector<int64_t> python_calls();

}  // namespace fused_adaptive
