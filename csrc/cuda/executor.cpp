// Step on a GPU: its launches and their order. Kernels read the phase of intervals and AMP's found_inf on the device.
// If counts are on the host, the host also counts and leaves out launches without work. After a capture the host
// uploads inputs in every step: replays of a CUDA graph repeat the uploads of its capture without the host, so the host
// does not know what is on the device.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"
#include "layout.h"
#include "plan/members.h"

namespace fused_adaptive::cuda {
namespace {

class CudaExecutor : public Executor {
 public:
  CudaExecutor(int device, bool on_device) : device_(device), on_device_(on_device) {}

  void step(Plan& plan, const StepInputs& inputs) override {
    const DeviceGuard guard(device_);
    begin(plan, inputs.hypers);
    if (!on_device_ && inputs.found_inf != nullptr) {
      throw std::runtime_error(
          "fused_adaptive: only the device knows whether this step is skipped, and the counters are on the host: "
          "construct the optimizer with capturable=True, or fused=True");
    }
    for (const Member& m : plan.members) {
      if (m.grad != nullptr && m.grad_dtype != m.dtype) {
        throw std::runtime_error("fused_adaptive: the gradient of parameter " + std::to_string(m.index) +
                                 " is of another dtype than the parameter; convert it before the step");
      }
    }
    Step args = upload(plan, inputs);
    const std::vector<bool> ending = on_device_ ? std::vector<bool>(plan.policies.size(), true) : ending_policies(plan);
    for (const Unit& unit : layout_->units) {
      const Policy& policy = plan.policies[unit.rule];
      const bool measures = policy.kind == PolicyKind::hypergradient ||
                            (policy.kind == PolicyKind::trainable && policy.source == Source::gradient);
      if (measures && (policy.kind == PolicyKind::hypergradient || may_end(policy, ending[unit.rule]))) {
        measure(unit, args, When::before_update);
      }
    }
    update(args);
    for (const Unit& unit : layout_->units) {
      const Policy& policy = plan.policies[unit.rule];
      const bool measures = policy.kind == PolicyKind::trainable && policy.source != Source::gradient;
      if (measures && may_end(policy, ending[unit.rule])) measure(unit, args, When::after_update);
    }
    count_on_host(plan, inputs.hypers, ending);
  }

  Traces take_traces() override { return {std::exchange(capturing_, false), std::exchange(is_elsewhere_, false)}; }

  std::vector<std::shared_ptr<void>> memory() const override {
    std::vector<std::shared_ptr<void>> all;
    if (layout_ != nullptr) all = layout_->memory();
    all.push_back(mirrors_memory_.memory());
    return all;
  }

  std::vector<int64_t> unfilled(const Plan& plan) const override {
    if (!on_device_ || mirrors_.empty()) return Executor::unfilled(plan);
    const DeviceGuard guard(device_);
    const cudaStream_t stream = current_stream(device_);
    std::vector<Mirror> counted(plan.members.size());
    check(cudaMemcpyAsync(counted.data(), mirrors_memory_.at<Mirror>(), counted.size() * sizeof(Mirror),
                          cudaMemcpyDeviceToHost, stream),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    std::vector<int64_t> found;
    for (size_t i = 0; i < counted.size(); ++i) {
      if (counted[i].step == 0) found.push_back(static_cast<int64_t>(i));
    }
    return found;
  }

  void end_interval(Plan& plan, const std::vector<Hyper>& hypers) override {
    const DeviceGuard guard(device_);
    begin(plan, hypers);
    Step args = step_args(plan);
    upload_hypers(hypers, args);
    std::vector<Bucket> adjusted;
    unsigned blocks = 0;
    for (const Bucket& bucket : layout_->buckets) {
      if (!bucket.scales_elements) continue;
      adjusted.push_back(bucket);
      adjusted.back().kernel = adjust_kernel(bucket.dtype);
      blocks += bucket.blocks;
    }
    const bool has_active = std::any_of(plan.policies.begin(), plan.policies.end(),
                                        [](const Policy& policy) { return policy.kind == PolicyKind::active; });
    if (has_active && adjusted.empty()) {  // all tensors are empty, but their counts must be restarted
      adjusted.push_back({adjust_kernel(DType::f32), nullptr, 0, blocks = 1, DType::f32, true});
    }
    for (const Bucket& bucket : adjusted) {
      Launch work = {};
      work.chunks = bucket.chunks;
      work.turns = layout_->turns(bucket.count);
      work.finished_blocks = layout_->finished_blocks;
      work.blocks = blocks;
      launch(bucket.kernel, bucket.blocks, stream_, args, work);
    }
    for (const Unit& unit : layout_->units) {
      if (plan.policies[unit.rule].kind == PolicyKind::trainable) measure(unit, args, When::now);
    }
    if (on_device_) return;
    for (const Policy& policy : plan.policies) {
      for (int member : policy.members) {
        const Numbers n = host_numbers(plan.members[member]);
        if (policy.kind == PolicyKind::active) restart_active(n);
        if (policy.kind == PolicyKind::trainable) end_on_host(policy, n, false);
      }
    }
    remember(plan);
  }

 private:
  static bool may_end(const Policy& policy, bool ends) { return policy.interval > 0 && ends; }

  // Gets the stream, builds the tables if needed, and uploads counts that differ from those on the host.
  void begin(const Plan& plan, const std::vector<Hyper>& hypers) {
    stream_ = current_stream(device_);
    capturing_ = is_capturing(stream_);
    sharing_ = plan.sharing;
    if (capturing_ && !on_device_) {
      throw std::runtime_error(
          "fused_adaptive: this optimizer counts on the host and cannot be captured in a CUDA "
          "graph: construct it with capturable=True");
    }
    std::vector<bool> couples(plan.groups.size());
    for (size_t i = 0; i < couples.size(); ++i) {
      couples[i] = plan.groups[i].coupled && hypers[i].weight_decay != 0;
    }
    if (layout_ == nullptr || couples != couples_) {
      if (capturing_) {
        throw std::runtime_error(
            "fused_adaptive: parameters, state, their number or whether there is weight decay have changed, and the "
            "tables cannot be rebuilt while a CUDA graph is being captured: take one step before the capture");
      }
      if (uploader_ == nullptr) {
        uploader_ = std::make_unique<Uploader>(device_);
        mirrors_memory_.allocate_zeros(device_, plan.members.size() * sizeof(Mirror), stream_);
      }
      if (was_captured_) captured_.push_back(std::move(layout_));
      layout_ = std::make_unique<Layout>(plan, couples, mirrors_memory_.at<Mirror>(), on_device_, device_, stream_);
      couples_ = std::move(couples);
      streams_.clear();
      was_captured_ = false;
      forget_uploads();
    }
    was_captured_ |= capturing_;
    note_stream();
    if (on_device_ && !mirrors_.empty()) return;
    // Kernels count too, so only counts that other code has changed are uploaded.
    std::vector<Mirror> found;
    found.reserve(plan.members.size());
    for (const Member& m : plan.members) found.push_back(on_device_ ? first_only(m) : mirror_of(m));
    if (!same(found, mirrors_)) {
      uploader_->send(mirrors_memory_.at<Mirror>(), found.data(), found.size() * sizeof(Mirror), stream_);
      mirrors_ = std::move(found);
    }
  }

  // Torch must know each stream that uses its memory, besides the stream that was current at the allocation.
  void note_stream() {
    if (std::find(streams_.begin(), streams_.end(), stream_) != streams_.end()) return;
    streams_.push_back(stream_);
    is_elsewhere_ = true;
  }

  void forget_uploads() {
    grads_.clear();
    hypers_.clear();
    lrs_.clear();
  }

  // Returns the mirror of a member with counters on the device. Only its step is used, as a flag: whether the momentum
  // buffer is initialized.
  static Mirror first_only(const Member& m) {
    Mirror mirror = {};
    mirror.step = m.first || m.at[kState0] == nullptr ? 0 : 1;
    return mirror;
  }

  static bool same(const std::vector<Mirror>& a, const std::vector<Mirror>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Mirror)) == 0;
  }

  Step step_args(const Plan& plan) const {
    Step args = {};
    args.tensors = layout_->tensors;
    args.tensor_count = static_cast<int32_t>(plan.members.size());
    args.rules = layout_->rules;
    return args;
  }

  // Uploads the inputs of a step that have changed.
  Step upload(const Plan& plan, const StepInputs& inputs) {
    Step args = step_args(plan);
    args.grads = layout_->grads;
    args.random_rates = inputs.random_rates;
    args.grad_scale = inputs.grad_scale;
    args.found_inf = inputs.found_inf;
    found_grads_.clear();
    for (const Member& m : plan.members) found_grads_.push_back(m.grad);
    if (was_captured_ || found_grads_ != grads_) {
      uploader_->send(layout_->grads, found_grads_.data(), found_grads_.size() * sizeof(void*), stream_);
      grads_.swap(found_grads_);
    }
    upload_hypers(inputs.hypers, args);
    give_powers(plan, inputs.hypers, args);
    if (!inputs.lrs.empty()) {
      args.lrs = layout_->lrs;
      const auto same = [](const DeviceNumber& a, const DeviceNumber& b) {
        return a.at == b.at && a.is_double == b.is_double;
      };
      if (was_captured_ || !std::equal(lrs_.begin(), lrs_.end(), inputs.lrs.begin(), inputs.lrs.end(), same)) {
        uploader_->send(layout_->lrs, inputs.lrs.data(), inputs.lrs.size() * sizeof(DeviceNumber), stream_);
        lrs_ = inputs.lrs;
      }
    }
    return args;
  }

  void upload_hypers(const std::vector<Hyper>& hypers, Step& args) {
    args.far_hypers = layout_->hypers;
    const size_t bytes = hypers.size() * sizeof(Hyper);
    if (layout_->hypers == nullptr) {
      std::copy(hypers.begin(), hypers.end(), args.hypers);
    } else if (was_captured_ || bytes != hypers_.size() * sizeof(Hyper) ||
               std::memcmp(hypers_.data(), hypers.data(), bytes) != 0) {
      uploader_->send(layout_->hypers, hypers.data(), bytes, stream_);
      hypers_ = hypers;
    }
  }

  // Computes the powers for the first tensor of each param group in this step, since most tensors of a param group have
  // the same step count.
  void give_powers(const Plan& plan, const std::vector<Hyper>& hypers, Step& args) const {
    if (on_device_ || args.far_hypers != nullptr) return;
    for (const Member& m : plan.members) {
      GivenPowers& given = args.powers[m.group];
      if (given.t >= 0 || m.grad == nullptr || m.at[kStep] == nullptr) continue;
      given.t = host_numbers(m).step_count() + 1;
      given.powers = powers_of(plan.groups[m.group].backbone, hypers[m.group], given.t);
    }
  }

  void update(const Step& args) {
    Launch work = {};
    work.finished_blocks = layout_->finished_blocks;
    for (const Bucket& bucket : layout_->buckets) work.blocks += bucket.blocks;
    for (const Bucket& bucket : layout_->buckets) {
      work.chunks = bucket.chunks;
      work.turns = layout_->turns(bucket.count);
      launch(bucket.kernel, bucket.blocks, stream_, args, work);
    }
  }

  void measure(const Unit& unit, const Step& args, When when) {
    Launch work = {};
    work.finished_blocks = layout_->finished_blocks;
    work.blocks = unit.blocks;
    work.rule = unit.rule;
    work.when = when;
    work.all_partials = layout_->partials;
    work.group_sums = layout_->group_sums;
    work.groups = unit.groups;
    work.group_count = unit.group_count;
    work.shares = unit.shares;
    work.share_count = unit.share_count;
    work.outcomes = layout_->outcomes;
    work.products = sharing_.products;
    for (const Measurement& measurement : unit.launches) {
      work.chunks = measurement.chunks;
      work.turns = layout_->turns(measurement.count);
      work.partials = layout_->partials + measurement.first_partial;
      launch(measurement.kernel, measurement.blocks, stream_, args, work);
    }
    if (sharing_.sum == nullptr) return;
    sharing_.sum();
    launch(finish_kernel(), 1, stream_, args, work);
  }

  void count_on_host(Plan& plan, const std::vector<Hyper>& hypers, const std::vector<bool>& ending) {
    for (Member& m : plan.members) {
      if (m.grad == nullptr) continue;
      m.first = false;
      if (on_device_) continue;
      count_step(host_numbers(m), hypers[m.group]);
      host_numbers(m).count_rounding();
    }
    if (on_device_) return;
    for (size_t i = 0; i < plan.policies.size(); ++i) {
      const Policy& policy = plan.policies[i];
      for (int member : policy.members) {
        const Member& m = plan.members[member];
        const Numbers n = host_numbers(m);
        const bool applied = m.grad != nullptr;
        if (policy.kind == PolicyKind::active) {
          count_active(policy, n, applied, hypers[m.group].has_rate());
        } else if (ending[i]) {
          end_on_host(policy, n, applied);
        } else {
          count_scalar(policy, n, applied, 0, 0);
        }
      }
    }
    remember(plan);
  }

  // Returns the counts, which are on the host. Gains and sums of rates are on the device.
  static Numbers host_numbers(const Member& m) {
    Numbers n = numbers_of(m);
    n.gain = n.lr_sum = n.lr_last = nullptr;
    return n;
  }

  // Only the device knows whether a tensor could move, that is, whether its rates and its gain are not 0.
  // tlr_applied_prev is exact there. That of the host, which checkpoints save, differs only if nothing moved. The same
  // applies to the sign of active_applied if lr is a tensor on the device.
  static void end_on_host(const Policy& policy, const Numbers& n, bool applied) {
    const int64_t steps = applied_steps(n, {applied, 0});
    if (policy.has_eta && steps > 0) *n.tlr_applied_prev = steps;
    restart_trainable(n);
  }

  void remember(const Plan& plan) {
    mirrors_.clear();
    for (const Member& m : plan.members) mirrors_.push_back(mirror_of(m));
  }

  const int device_;
  const bool on_device_;
  std::unique_ptr<Layout> layout_;
  std::vector<std::unique_ptr<Layout>> captured_;  // earlier layouts to which CUDA graphs point
  std::unique_ptr<Uploader> uploader_;
  Buffer mirrors_memory_;
  std::vector<bool> couples_;
  std::vector<Mirror> mirrors_;  // counts on the device, as uploaded or counted
  std::vector<const void*> grads_, found_grads_;
  std::vector<Hyper> hypers_;
  std::vector<DeviceNumber> lrs_;
  cudaStream_t stream_ = nullptr;
  Sharing sharing_;
  std::vector<cudaStream_t> streams_;  // that have used the layout
  bool capturing_ = false, is_elsewhere_ = false;
  bool was_captured_ = false;  // a CUDA graph points to the layout
};

}  // namespace
}  // namespace fused_adaptive::cuda

namespace fused_adaptive {

std::unique_ptr<Executor> make_cuda_executor(const Plan&, int device, bool on_device) {
  return std::make_unique<cuda::CudaExecutor>(device, on_device);
}

std::string why_not_on_cuda(int device) {
  const cuda::DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t result =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(cuda::small_upload_kernel()));
  if (result == cudaSuccess) return "";
  cudaGetLastError();  // clears the error, else later code would get it
  return cudaGetErrorString(result);
}

}  // namespace fused_adaptive
