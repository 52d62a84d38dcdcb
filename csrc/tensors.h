// A plan with the torch tensors that it stands on.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "plan.h"

namespace fused_adaptive {

using torch::stable::Tensor;

// What plan_check returns: whether a step can be taken, or what has to happen in Python before that.
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

  // Takes the gradients of all members in order, but for those of the absent (ascending), for the step to come.
  Outcome check(std::vector<Tensor> grads, const std::vector<int64_t>& absent);
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

  void check_complete(const Member& member) const;
  bool addresses_hold() const;
  bool take_gradient(Member& member, const Tensor& param, const Tensor& grad) const;
  DeviceNumber device_number(const Tensor& tensor, const char* name) const;

  Plan plan_;
  std::vector<Tensor> params_, grads_, shared_;
  std::vector<Bound> bound_;
  int32_t device_type_ = 0, device_index_ = 0;
  bool on_device_ = false, is_ready_ = false;
};

}  // namespace fused_adaptive
