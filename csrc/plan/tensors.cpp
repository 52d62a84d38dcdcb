// Builds a plan from tensors. All of them are checked before anything is written.
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "members.h"

namespace fused_adaptive {
namespace {

struct RoleInfo {
  const char* name;
  Made made;
  const char* dtype;
};
constexpr RoleInfo kRoleInfo[kRoles] = {
#define FA_INFO(name, text, made) {text, Made::made, #made},
    FA_FOR_EACH_SHAPED_ROLE(FA_INFO) FA_FOR_EACH_NUMBER_ROLE(FA_INFO)
#undef FA_INFO
};

// In the order of PolicyKind, Source and Readiness.
constexpr const char* kPolicyNames[] = {"ActiveLR", "TrainableLR", "Hypergradient"};
constexpr const char* kSourceNames[] = {"displacement", "gradient", "preconditioned"};
constexpr const char* kReadinessNames[] = {"ready", "gradients", "stale"};

int checked(const char* what, int64_t number, size_t count) {
  FA_CHECK(number >= 0 && number < static_cast<int64_t>(count), "there is no ", what, " ", number);
  return static_cast<int>(number);
}

int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
      return 4;
    case DType::i8:
      return 1;
    default:
      return 2;
  }
}

DType role_dtype(int role, const Member& m) {
  switch (kRoleInfo[role].made) {
    case Made::parameter:
      return m.dtype;
    case Made::state:
      return m.dtype == DType::f64 ? DType::f64 : DType::f32;
    case Made::step:
      return m.step_is_double ? DType::f64 : DType::f32;
    case Made::float64:
      return DType::f64;
    case Made::int8:
      return DType::i8;
    case Made::int16:
      return DType::i16;
    default:
      return DType::i64;
  }
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// Returns whether the elements of both are in the same order in memory. Strides of dimensions of size 1 do not matter.
bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 1 && x[i] != y[i]) return false;
  }
  return true;
}

// Returns whether the elements fill the memory without gaps or overlaps, in any order of dimensions.
bool is_dense(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return true;
    if (sizes[i] > 1) dims.emplace_back(strides[i], sizes[i]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

void check_overlap(std::vector<std::pair<const char*, const char*>> ranges) {
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    FA_CHECK(ranges[i].first >= ranges[i - 1].second,
             "two of the optimizer's parameters or state tensors share memory: an update in place would write it "
             "twice; clone one of them");
  }
}

}  // namespace

std::string declarations() {
  std::ostringstream text;
  text << "roles";
  for (int role = 0; role < kRoles; ++role) {
    text << " " << kRoleInfo[role].name << ":" << kRoleInfo[role].dtype << (role < kElementRoles ? ":shaped" : "");
  }
  text << "\nstructures";
  for (const Structure& s : kStructures) {
    text << " " << s.name << ":" << s.states << (s.is_lazy ? ":lazy" : "") << (s.stores_direction ? ":stores" : "");
  }
#define FA_NAME(name) << " " #name
  text << "\nhyper" FA_FOR_EACH_HYPER(FA_NAME) << "\nrule" FA_FOR_EACH_ARGUMENT(FA_NAME);
#undef FA_NAME
  const auto tell = [&](const char* what, const auto& names) {
    text << "\n" << what;
    for (const char* name : names) text << " " << name;
  };
  tell("policies", kPolicyNames);
  tell("sources", kSourceNames);
  tell("readiness", kReadinessNames);
  text << "\n";
  return text.str();
}

TensorPlan::TensorPlan(std::vector<Tensor> params, const std::vector<int64_t>& groups,
                       const std::vector<int64_t>& indices, const std::vector<int64_t>& backbones,
                       const std::vector<int64_t>& coupled, const std::vector<int64_t>& maximize, bool on_device)
    : params_(std::move(params)), on_device_(on_device) {
  FA_CHECK(groups.size() == params_.size() && indices.size() == params_.size(),
           "groups and indices must have one entry a parameter");
  FA_CHECK(coupled.size() == backbones.size() && maximize.size() == backbones.size(),
           "coupled and maximize must have one entry a group");
  for (size_t i = 0; i < backbones.size(); ++i) {
    plan_.groups.push_back({checked("backbone", backbones[i], kBackbones), coupled[i] != 0, maximize[i] != 0});
  }
  for (size_t i = 0; i < params_.size(); ++i) {
    const Tensor& p = params_[i];
    if (i == 0) {
      FA_TORCH(aoti_torch_get_device_type(p.get(), &device_type_));
      FA_TORCH(aoti_torch_get_device_index(p.get(), &device_index_));
    }
    Member m;
    FA_CHECK(dtype_of(p.get(), m.dtype) && is_float(m.dtype), "parameter ", indices[i],
             " is not float64, float32, bfloat16 or float16");
    FA_CHECK(same_device(p, device_type_, device_index_), "parameter ", indices[i], " is on another device");
    FA_CHECK(is_dense(p), "parameter ", indices[i], " has gaps or overlaps in memory");
    FA_CHECK(groups[i] >= 0 && groups[i] < static_cast<int64_t>(plan_.groups.size()), "no group ", groups[i]);
    m.numel = p.numel();
    m.index = indices[i];
    m.group = static_cast<int>(groups[i]);
    plan_.members.push_back(m);
    bound_.push_back({static_cast<int>(i), kParam, p});
  }
}

void TensorPlan::bind(int64_t number, const std::vector<int64_t>& members, const std::vector<Tensor>& tensors) {
  const Role role = static_cast<Role>(checked("role", number, kRoles));
  const RoleInfo& info = kRoleInfo[role];
  const char* const role_name = info.name;
  FA_CHECK(members.size() == tensors.size(), role_name, ": one tensor a member");
  for (size_t i = 0; i < members.size(); ++i) {
    Member& m = plan_.members.at(static_cast<size_t>(members[i]));
    const Tensor& t = tensors[i];
    DType dtype;
    FA_CHECK(dtype_of(t.get(), dtype), role_name, " of parameter ", m.index, " has an unknown dtype");
    if (role == kStep) m.step_is_double = dtype == DType::f64;
    FA_CHECK(dtype == role_dtype(role, m), role_name, " of parameter ", m.index, " has the wrong dtype");
    const Tensor& p = params_[static_cast<size_t>(members[i])];
    if (role < kElementRoles) {
      FA_CHECK(same_sizes(t, p) && same_layout(t, p) && same_device(t, device_type_, device_index_), role_name,
               " of parameter ", m.index, " differs from it in shape, strides or device");
    } else {
      FA_CHECK(t.numel() == 1, role_name, " of parameter ", m.index, " must have one element");
      const bool host = !on_device_ && (info.made == Made::step || info.made == Made::int64);  // a count
      FA_CHECK(host ? t.is_cpu() : same_device(t, device_type_, device_index_), role_name, " of parameter ", m.index,
               " is on the wrong device");
    }
    bound_.push_back({static_cast<int>(members[i]), role, t});
  }
}

void TensorPlan::mark_first(const std::vector<int64_t>& members) {
  for (int64_t i : members) plan_.members.at(static_cast<size_t>(i)).first = true;
}

void TensorPlan::mark_parked(const std::vector<int64_t>& members) {
  extents_of_.resize(size());
  for (int64_t i : members) extents_of_.at(static_cast<size_t>(i)).parked = true;
}

void TensorPlan::set_seeds(const std::vector<int64_t>& seeds) {
  FA_CHECK(seeds.size() == plan_.groups.size(), "one seed a group");
  for (Member& m : plan_.members) m.seed = seeds[static_cast<size_t>(m.group)];
}

void TensorPlan::add_policy(int64_t kind, const std::vector<int64_t>& members, const std::vector<double>& arguments) {
  FA_CHECK(arguments.size() == kArguments, "a policy has ", kArguments, " arguments, got ", arguments.size());
  Arguments own;
  std::memcpy(&own, arguments.data(), sizeof own);
  Policy policy = {rule_of(static_cast<PolicyKind>(checked("policy", kind, std::size(kPolicyNames))), own), {}};
  const int number = static_cast<int>(plan_.policies.size());
  for (int64_t i : members) {
    Member& m = plan_.members.at(static_cast<size_t>(i));
    (policy.kind == PolicyKind::active ? m.active : m.scalar) = number;
    policy.members.push_back(static_cast<int>(i));
  }
  plan_.policies.push_back(std::move(policy));
}

void TensorPlan::share(Tensor products, void (*sum)()) {
  FA_CHECK(products.scalar_type() == torch::headeronly::ScalarType::Double && products.is_contiguous() &&
               products.numel() == 2 * static_cast<int64_t>(size()) &&
               same_device(products, device_type_, device_index_),
           "products must be float64, (members, 2), on the parameters' device");
  plan_.sharing = {static_cast<Products*>(products.data_ptr()), sum};
  shared_ = {std::move(products)};
}

// Kernels read the arrays of their mode without checks, so each must exist. An array that would change the mode must
// not exist.
void TensorPlan::check_complete(size_t member) const {
  const Member& m = plan_.members[member];
  const auto need = [&](Role role, bool needed) {
    FA_CHECK((m.at[role] != nullptr) == needed, "parameter ", m.index,
             needed ? " lacks the state " : " has no use for the state ", kRoleInfo[role].name);
  };
  for (Role role : {kLow, kRoundingStep}) {
    FA_CHECK(m.at[role] == nullptr || m.dtype == DType::bf16, "parameter ", m.index,
             " is not bfloat16 and has no use for the state ", kRoleInfo[role].name);
  }
  if (m.at[kLow] != nullptr) need(kRoundingStep, false);
  const Structure& structure = kStructures[plan_.groups[m.group].backbone];
  for (int i = 0; i < 3 && !extents_of_[member].parked; ++i) {
    if (!structure.is_lazy) need(static_cast<Role>(kState0 + i), i < structure.states);
  }
  need(kStep, structure.states > 1);
  for (Role role : {kGain, kGradSum, kSignPrev, kActiveStep, kActiveApplied}) need(role, m.active >= 0);
  const Policy* scalar = m.scalar >= 0 ? &plan_.policies[static_cast<size_t>(m.scalar)] : nullptr;
  const bool trains = scalar != nullptr && scalar->kind == PolicyKind::trainable;
  if (scalar != nullptr) need(kTensorGain, true);
  need(kDirectionValid, scalar != nullptr && !trains);
  for (Role role : {kLrSum, kTlrStep, kTlrApplied, kTlrAppliedPrev}) need(role, trains);
  need(kLrLast, trains && scalar->has_eta);
  need(kMeanSum, trains && scalar->source != Source::displacement);
  need(kStart, trains && scalar->source != Source::gradient);
  need(kPrevious, trains || (scalar != nullptr && structure.stores_direction));
}

void TensorPlan::note_extents() {
  extents_of_.resize(size());
  for (size_t i = 0; i < params_.size(); ++i) {
    const auto sizes = params_[i].sizes(), strides = params_[i].strides();
    const bool parked = extents_of_[i].parked;
    extents_of_[i] = {plan_.members[i].dtype, static_cast<int64_t>(sizes.size()), extents_.size(), parked};
    extents_.insert(extents_.end(), sizes.begin(), sizes.end());
    extents_.insert(extents_.end(), strides.begin(), strides.end());
  }
}

void TensorPlan::finish() {
  std::stable_sort(bound_.begin(), bound_.end(), [](const Bound& a, const Bound& b) { return a.member < b.member; });
  for (size_t i = 0; i < bound_.size(); ++i) {
    if (bound_[i].role == kParam) first_place_.push_back(i);
  }
  first_place_.push_back(bound_.size());
  note_extents();
  std::vector<std::pair<const char*, const char*>> ranges;
  for (const Bound& b : bound_) {
    const auto member = static_cast<size_t>(b.member);
    Member& m = plan_.members[member];
    places_.push_back(nullptr);
    if (b.role == kParam && extents_of_[member].parked) continue;
    void* address = b.tensor.data_ptr();
    // An empty tensor has no address, but its role must not count as missing.
    static char nowhere[16];
    m.at[b.role] = address != nullptr ? address : nowhere;
    if (b.tensor.numel() == 0) continue;
    FA_CHECK(address != nullptr, "the memory of ", kRoleInfo[b.role].name, " of parameter ", m.index,
             " has been freed");
    places_.back() = address;
    const char* begin = static_cast<const char*>(address);
    ranges.emplace_back(begin, begin + b.tensor.numel() * bytes_of(role_dtype(b.role, m)));
  }
  bound_ = {};
  params_ = {};
  check_overlap(std::move(ranges));
  for (size_t i = 0; i < size(); ++i) {
    check_complete(i);
    Member& m = plan_.members[i];
    m.adapts = m.active >= 0 || m.scalar >= 0 || m.at[kTensorGain] != nullptr;
  }
  if (device_type_ == aoti_torch_device_type_cpu()) {
    plan_.executor = make_cpu_executor(plan_);
    return;
  }
#ifdef FUSED_ADAPTIVE_WITH_CUDA
  if (device_type_ == aoti_torch_device_type_cuda()) {
    plan_.executor = make_cuda_executor(plan_, device_index_, on_device_);
    return;
  }
#endif
  FA_CHECK(false, "there are no native kernels for this device in this build");
}

void TensorPlan::prefetch_from(const std::vector<int64_t>& addresses) {
  FA_CHECK(addresses.size() == 2 * places_.size(), "two addresses a tensor");
  objects_.clear();
  for (size_t i = 0; i < addresses.size(); i += 2) {
    objects_.push_back({reinterpret_cast<const char*>(addresses[i]), reinterpret_cast<const char*>(addresses[i + 1])});
  }
}

std::vector<Tensor> TensorPlan::memory() const {
  std::vector<Tensor> tensors;
  for (const std::shared_ptr<void>& memory : plan_.executor->memory()) {
    if (const OfTensor* of = std::get_deleter<OfTensor>(memory)) tensors.push_back(of->tensor);
  }
  return tensors;
}

}  // namespace fused_adaptive
