// What every step checks before it changes anything, and what it is given. Steps of many small tensors spend their time
// here, so that a tensor may cost some tens of nanoseconds: it is looked at once, by whichever thread, through the C
// interface.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include "counting.h"
#include "tensors.h"

namespace fused_adaptive {
namespace {

// Fewer tensors are not worth waking a thread for.
constexpr int64_t kCheckedByOneThread = 64;

// As many as a thread takes on at a time, and how far it fetches ahead.
constexpr int64_t kAtATime = 32, kAhead = 4;

}  // namespace

bool dtype_of(AtenTensorHandle tensor, DType& dtype) {
  static const std::pair<int32_t, DType> known[] = {
      {aoti_torch_dtype_float32(), DType::f32},   {aoti_torch_dtype_float64(), DType::f64},
      {aoti_torch_dtype_bfloat16(), DType::bf16}, {aoti_torch_dtype_float16(), DType::f16},
      {aoti_torch_dtype_int8(), DType::i8},       {aoti_torch_dtype_int64(), DType::i64},
      {aoti_torch_dtype_int16(), DType::i16},
  };
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &code));
  for (const auto& [own_code, own] : known) {
    if (code != own_code) continue;
    dtype = own;
    return true;
  }
  return false;
}

bool is_float(DType dtype) { return dtype < DType::i8; }

bool same_device(const Tensor& tensor, int32_t type, int32_t index) {
  int32_t own_type, own_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &own_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &own_index));
  return own_type == type && (own_index == index || type == aoti_torch_device_type_cpu());
}

// Whether flat storage means the same elements as in the parameter. Strides of dimensions of size 1 mean nothing.
bool TensorPlan::has_extents(size_t member, int64_t dims, const int64_t* sizes, const int64_t* strides) const {
  const Extents& own = extents_of_[member];
  if (dims != own.dims) return false;
  const int64_t* expected = extents_.data() + own.at;
  for (int64_t i = 0; i < dims; ++i) {
    if (sizes[i] != expected[i] || (sizes[i] > 1 && strides[i] != expected[dims + i])) return false;
  }
  return true;
}

// Whether a parameter and its state are what and where they were when the plan was built.
bool TensorPlan::holds(size_t member) const {
  for (size_t i = first_place_[member]; i < first_place_[member + 1]; ++i) {
    void* address;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(places_[i].tensor.get(), &address));
    if (address != places_[i].at && places_[i].at != nullptr) return false;  // an empty one may be anywhere
  }
  const AtenTensorHandle param = places_[first_place_[member]].tensor.get();
  DType dtype;
  int64_t dims, *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(param, &dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(param, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(param, &strides));
  return dtype_of(param, dtype) && dtype == extents_of_[member].dtype && has_extents(member, dims, sizes, strides);
}

void TensorPlan::take(size_t member, const Gradient& grad) {
  Member& m = plan_.members[member];
  const bool on_cpu = device_type_ == aoti_torch_device_type_cpu();
  const bool is_here = grad.device_type == device_type_ && (on_cpu || grad.device_index == device_index_);
  const bool can_be_read = is_float(grad.dtype) && (on_cpu || grad.dtype == m.dtype);
  if (!is_here || !can_be_read || !has_extents(member, grad.dims, grad.sizes, grad.strides)) return refuse();
  m.grad_dtype = grad.dtype;
  m.grad = m.numel > 0 ? grad.at : m.at[kParam];
  if (m.grad == nullptr) refuse();
  if (m.numel > 0 && m.grad == m.at[kParam]) overwritten_ = static_cast<int64_t>(member);
  // A buffer that the first update makes has to be bound first.
  const int backbone = plan_.groups[m.group].backbone;
  if ((backbone == kSgdMomentum || backbone == kSgdNesterov) && m.at[kState0] == nullptr) lacks_state_ = true;
}

std::optional<Outcome> TensorPlan::check(const std::function<bool()>& take_gradients) {
  is_ready_ = lacks_state_ = false;
  are_usable_ = true;
  overwritten_ = -1;
  const std::thread::id caller = std::this_thread::get_id();
  bool is_asked = false, gave_up = false;  // the calling thread's own
  std::atomic<int64_t> unseen{static_cast<int64_t>(size())};
  std::atomic<bool> is_stale{false};
  std::exception_ptr error;
  std::mutex mutex;
  const auto look = [&](int64_t, int64_t) {
    try {
      if (std::this_thread::get_id() == caller && !is_asked) {
        is_asked = true;
        gave_up = !take_gradients();
      }
      // From the last on: gradients are taken from the first on, and two threads meet no sooner than they have to.
      for (int64_t end; (end = unseen.fetch_sub(kAtATime)) > 0 && !is_stale;) {
        for (int64_t i = std::max<int64_t>(end - kAtATime, 0); i < end; ++i) {
          if (i + kAhead < end) prefetch_places(static_cast<size_t>(i + kAhead));
          if (!holds(static_cast<size_t>(i))) is_stale = true;
        }
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  };
  torch::stable::parallel_for(0, unseen, kCheckedByOneThread, look);
  look(0, 0);  // all of it, if none of the threads was this one
  if (gave_up) return std::nullopt;
  if (error) std::rethrow_exception(error);
  if (is_stale || lacks_state_) return kStale;
  if (!are_usable_) return kGradients;
  STD_TORCH_CHECK(overwritten_ < 0, "the gradient of parameter ",
                  plan_.members[std::max<int64_t>(overwritten_, 0)].index,
                  " is the parameter itself: it would be overwritten while it is read; clone it");
  is_ready_ = true;
  return kReady;
}

DeviceNumber TensorPlan::device_number(const Tensor& tensor, const char* name) const {
  const bool is_double = tensor.scalar_type() == torch::headeronly::ScalarType::Double;
  STD_TORCH_CHECK((is_double || tensor.scalar_type() == torch::headeronly::ScalarType::Float) && tensor.numel() == 1,
                  name, " must be a float32 or float64 tensor of one element");
  STD_TORCH_CHECK(same_device(tensor, device_type_, device_index_), name, " must be on the parameters' device");
  return {tensor.data_ptr(), is_double};
}

std::vector<Hyper> TensorPlan::hypers_of(const std::vector<double>& numbers) const {
  STD_TORCH_CHECK(numbers.size() == kHypers * plan_.groups.size(), kHypers, " hyperparameters a group");
  std::vector<Hyper> hypers(plan_.groups.size());
  static_assert(sizeof(Hyper) == kHypers * sizeof(double), "nothing but numbers");
  if (!numbers.empty()) std::memcpy(hypers.data(), numbers.data(), numbers.size() * sizeof(double));
  return hypers;
}

void TensorPlan::step(const std::vector<double>& hypers, const std::optional<Tensor>& draws,
                      const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                      const std::vector<Tensor>& lrs, const std::vector<int64_t>& lr_groups) {
  STD_TORCH_CHECK(is_ready_, "take the gradients first");
  StepInputs inputs;
  inputs.hypers = hypers_of(hypers);
  if (draws.has_value()) {
    STD_TORCH_CHECK(draws->scalar_type() == torch::headeronly::ScalarType::Double &&
                        same_device(*draws, device_type_, device_index_),
                    "draws must be float64, on the parameters' device");
    for (const Member& m : plan_.members) STD_TORCH_CHECK(m.index < draws->numel(), "one draw a parameter");
    inputs.draws = static_cast<const double*>(draws->data_ptr());
  }
  if (grad_scale.has_value()) inputs.grad_scale = device_number(*grad_scale, "grad_scale");
  if (found_inf.has_value()) {
    const DeviceNumber found = device_number(*found_inf, "found_inf");
    STD_TORCH_CHECK(!found.is_double, "found_inf must be float32");
    inputs.found_inf = static_cast<const float*>(found.at);
  }
  STD_TORCH_CHECK(lrs.size() == lr_groups.size(), "one group a tensor lr");
  if (!lrs.empty()) inputs.lrs.resize(plan_.groups.size());
  for (size_t i = 0; i < lrs.size(); ++i) {
    inputs.lrs.at(static_cast<size_t>(lr_groups[i])) = device_number(lrs[i], "lr");
  }
  plan_.executor->step(plan_, inputs);
  is_ready_ = false;
  grads_.clear();
}

void TensorPlan::end_interval(const std::vector<double>& hypers) {
  const std::vector<Hyper> own = hypers_of(hypers);
  for (size_t i = 0; i < params_.size(); ++i) {
    STD_TORCH_CHECK(holds(i), "parameters or state have moved in memory since the last step");
    leave_out(i);
  }
  is_ready_ = false;
  plan_.executor->end_interval(plan_, own);
}

}  // namespace fused_adaptive
