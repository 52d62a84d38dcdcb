// Checks of every step before it changes anything, and its inputs. They take most of the time of steps with many small
// tensors, so a tensor must not take more than some tens of nanoseconds.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "members.h"
#include "tensors.h"

namespace fused_adaptive {

bool dtype_of(AtenTensorHandle tensor, DType& dtype) {
  static const std::pair<int32_t, DType> known[] = {
      {aoti_torch_dtype_float32(), DType::f32},   {aoti_torch_dtype_float64(), DType::f64},
      {aoti_torch_dtype_bfloat16(), DType::bf16}, {aoti_torch_dtype_float16(), DType::f16},
      {aoti_torch_dtype_int8(), DType::i8},       {aoti_torch_dtype_int64(), DType::i64},
      {aoti_torch_dtype_int16(), DType::i16},
  };
  int32_t code;
  FA_TORCH(aoti_torch_get_dtype(tensor, &code));
  for (const auto& [own_code, own] : known) {
    if (code != own_code) continue;
    dtype = own;
    return true;
  }
  return false;
}

bool is_float(DType dtype) {
  return dtype == DType::f64 || dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16;
}

bool same_device(const Tensor& tensor, int32_t type, int32_t index) {
  int32_t own_type, own_index;
  FA_TORCH(aoti_torch_get_device_type(tensor.get(), &own_type));
  FA_TORCH(aoti_torch_get_device_index(tensor.get(), &own_index));
  return own_type == type && (own_index == index || type == aoti_torch_device_type_cpu());
}

// Returns whether the elements are in the same order in memory as those of the parameter. Strides of dimensions of size
// 1 do not matter.
bool TensorPlan::has_extents(size_t member, const View& tensor) const {
  const Extents& own = extents_of_[member];
  if (tensor.dims != own.dims) return false;
  const int64_t* expected = extents_.data() + own.at;
  for (int64_t i = 0; i < own.dims; ++i) {
    if (tensor.sizes[i] != expected[i]) return false;
    if (tensor.sizes[i] > 1 && tensor.strides[i] != expected[own.dims + i]) return false;
  }
  return true;
}

void TensorPlan::begin_check() {
  is_ready_ = lacks_state_ = is_stale_ = false;
  are_usable_ = true;
  overwritten_ = -1;
}

// The number of tensors whose objects are fetched ahead of the one that is looked at.
constexpr size_t kAhead = 4;

FA_INLINE void prefetch(const char* begin, int bytes) {  // GCC drops calls of a function that only prefetches
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(begin + at);
}

// Marks the plan as stale if the tensor has another address, dtype or layout than when the plan was built.
void TensorPlan::look_at(size_t member, size_t number, const View& tensor) {
  const size_t place = first_place_[member] + number;
  // The caller reads both objects to find a tensor's address, and they are rarely in a cache. Their first bytes are
  // fetched; nothing depends on what lies there.
  if (place + kAhead < objects_.size()) {
    prefetch(objects_[place + kAhead].tensor, 192);
    prefetch(objects_[place + kAhead].storage, 128);
  }
  const void* expected = places_[place];
  const Extents& own = extents_of_[member];
  if (own.parked && number == 0) {  // stale once it has memory and its shape again
    is_stale_ |= tensor.at != nullptr && has_extents(member, tensor);
    return;
  }
  is_stale_ |= expected != nullptr && tensor.at != expected;  // an empty tensor may have any address
  if (number == 0) is_stale_ |= tensor.dtype != own.dtype || !has_extents(member, tensor);
}

void TensorPlan::take(size_t member, const View& grad) {
  Member& m = plan_.members[member];
  if (extents_of_[member].parked) {
    is_stale_ = true;
    return;
  }
  const bool on_cpu = device_type_ == aoti_torch_device_type_cpu();
  const bool is_here = grad.device_type == device_type_ && (on_cpu || grad.device_index == device_index_);
  const bool can_be_read = grad.dtype && is_float(*grad.dtype) && (on_cpu || *grad.dtype == m.dtype);
  if (!is_here || !can_be_read || !has_extents(member, grad)) return refuse();
  m.grad_dtype = *grad.dtype;
  m.grad = m.numel > 0 ? grad.at : m.at[kParam];
  if (m.grad == nullptr) refuse();
  if (m.numel > 0 && m.grad == m.at[kParam]) overwritten_ = static_cast<int64_t>(member);
  // A momentum buffer must be bound before its first update.
  if (kStructures[plan_.groups[m.group].backbone].is_lazy && m.at[kState0] == nullptr) lacks_state_ = true;
}

Readiness TensorPlan::end_check() {
  if (is_stale_ || lacks_state_) return kStale;
  if (!are_usable_) return kGradients;
  FA_CHECK(overwritten_ < 0, "the gradient of parameter ", plan_.members[static_cast<size_t>(overwritten_)].index,
           " is the parameter itself: it would be overwritten while it is read; clone it");
  is_ready_ = true;
  return kReady;
}

DeviceNumber TensorPlan::device_number(const Tensor& tensor, const char* name) const {
  const bool is_double = tensor.scalar_type() == torch::headeronly::ScalarType::Double;
  FA_CHECK((is_double || tensor.scalar_type() == torch::headeronly::ScalarType::Float) && tensor.numel() == 1, name,
           " must be a float32 or float64 tensor of one element");
  FA_CHECK(same_device(tensor, device_type_, device_index_), name, " must be on the parameters' device");
  return {tensor.data_ptr(), is_double};
}

std::vector<Hyper> TensorPlan::hypers_of(const std::vector<double>& numbers) const {
  FA_CHECK(numbers.size() == kHypers * plan_.groups.size(), kHypers, " hyperparameters a group");
  std::vector<Hyper> hypers(plan_.groups.size());
  static_assert(sizeof(Hyper) == kHypers * sizeof(double), "nothing but numbers");
  if (!numbers.empty()) std::memcpy(hypers.data(), numbers.data(), numbers.size() * sizeof(double));
  return hypers;
}

Traces TensorPlan::step(const std::vector<double>& hypers, const std::optional<Tensor>& random_rates,
                        const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                        const std::vector<Tensor>& lrs, const std::vector<int64_t>& lr_groups) {
  FA_CHECK(is_ready_, "take the gradients first");
  StepInputs inputs;
  inputs.hypers = hypers_of(hypers);
  if (random_rates.has_value()) {
    FA_CHECK(random_rates->scalar_type() == torch::headeronly::ScalarType::Long && random_rates->is_contiguous() &&
                 random_rates->numel() == sizeof(RandomRates) / sizeof(int64_t) &&
                 same_device(*random_rates, device_type_, device_index_),
             "random_rates must be int64, of seed, step and width, on the parameters' device");
    inputs.random_rates = static_cast<const RandomRates*>(random_rates->data_ptr());
  }
  if (grad_scale.has_value()) inputs.grad_scale = device_number(*grad_scale, "grad_scale");
  if (found_inf.has_value()) {
    const DeviceNumber found = device_number(*found_inf, "found_inf");
    FA_CHECK(!found.is_double, "found_inf must be float32");
    inputs.found_inf = static_cast<const float*>(found.at);
  }
  FA_CHECK(lrs.size() == lr_groups.size(), "one group a tensor lr");
  if (!lrs.empty()) inputs.lrs.resize(plan_.groups.size());
  for (size_t i = 0; i < lrs.size(); ++i) {
    inputs.lrs.at(static_cast<size_t>(lr_groups[i])) = device_number(lrs[i], "lr");
  }
  plan_.executor->step(plan_, inputs);
  is_ready_ = false;
  grads_.clear();
  return plan_.executor->take_traces();
}

Traces TensorPlan::end_interval(const std::vector<double>& hypers) {
  const std::vector<Hyper> own = hypers_of(hypers);
  for (size_t i = 0; i < size(); ++i) leave_out(i);
  is_ready_ = false;
  plan_.executor->end_interval(plan_, own);
  return plan_.executor->take_traces();
}

}  // namespace fused_adaptive
