// What every step does with each of its Python objects, and the only place here that knows Python: called with the
// interpreter's lock held (fused_adaptive/python_calls.py). Tensors are asked through the function table of the DLPack
// standard, which torch.Tensor carries. That takes some tens of nanoseconds, an operator's argument several times that.
#include <Python.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "tensors.h"

// The interpreter has them; a library must not ask for what it is not linked with.
#pragma weak PyDict_Next
#pragma weak PyDict_Size
#pragma weak PyDict_Type
#pragma weak PyErr_Clear
#pragma weak PyErr_SetString
#pragma weak PyExc_RuntimeError
#pragma weak PyList_Append
#pragma weak PyList_GetItem
#pragma weak PyList_Size
#pragma weak PyObject_CallFunctionObjArgs
#pragma weak PyObject_GetAttr
#pragma weak PyUnicode_InternFromString
#pragma weak Py_DecRef
#pragma weak _Py_FalseStruct
#pragma weak _Py_NoneStruct

namespace fused_adaptive {
namespace {

// The structs of DLPack 1 that are needed here.
struct DLTensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchange {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void (*allocate)();
  void (*managed_from_object)();
  void (*managed_to_object)();
  int (*tensor_from_object)(void* object, DLTensor* tensor);
};
enum DLDevice : int32_t { kDLCPU = 1, kDLCUDA = 2 };
enum DLType : uint8_t { kDLFloat = 2, kDLBfloat = 4 };

bool dtype_of(const DLTensor& tensor, DType& dtype) {
  const auto [code, bits, lanes] = tensor.dtype;
  if (lanes != 1 || (code != kDLFloat && (code != kDLBfloat || bits != 16))) return false;
  if (bits != 64 && bits != 32 && bits != 16) return false;
  dtype = code == kDLBfloat ? DType::bf16 : bits == 64 ? DType::f64 : bits == 32 ? DType::f32 : DType::f16;
  return true;
}

void offer(TensorPlan& plan, size_t member, const DLTensor& tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  Gradient grad;
  const bool is_known = tensor.device.type == kDLCPU || tensor.device.type == kDLCUDA;
  if (!is_known || !dtype_of(tensor, grad.dtype) || (tensor.ndim > 0 && tensor.strides == nullptr)) {
    return plan.refuse();
  }
  grad.at = static_cast<const char*>(tensor.data) + tensor.byte_offset;
  grad.device_type = tensor.device.type == kDLCPU ? cpu : cuda;
  grad.device_index = tensor.device.index;
  grad.dims = tensor.ndim;
  grad.sizes = tensor.shape;
  grad.strides = tensor.strides;
  plan.take(member, grad);
}

// Whether it is a view that negates when it is read, of which the table does not tell. Such views are of the parts of
// complex numbers, every other number in memory: only with one element can they pass for dense.
bool is_negative_view(PyObject* object, const DLTensor& tensor, PyObject* is_neg) {
  if (std::any_of(tensor.shape, tensor.shape + tensor.ndim, [](int64_t size) { return size != 1; })) return false;
  PyObject* found = PyObject_CallFunctionObjArgs(is_neg, object, nullptr);
  Py_DecRef(found);  // null too
  return found != Py_False;
}

// Tensors lie all over memory: each waits for several lines of the caches, the next ones' are fetched meanwhile.
constexpr size_t kAhead = 8;

// The gradients of a plan's parameters, appended to a list. Returns how many parameters have none, -1 with an error set
// in Python.
int64_t take_gradients(TensorPlan& plan, const DLPackExchange* exchange, PyObject* is_neg, PyObject* params,
                       PyObject* grads) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  int64_t absent = 0;
  for (size_t i = 0; i < plan.size(); ++i) {
    if (i + kAhead < plan.size()) {
      __builtin_prefetch(PyList_GetItem(params, static_cast<Py_ssize_t>(i + kAhead)));
      plan.prefetch(i + kAhead);
    }
    PyObject* grad = PyObject_GetAttr(PyList_GetItem(params, static_cast<Py_ssize_t>(i)), name);
    if (grad == nullptr) return -1;
    int status = 0;
    if (grad == Py_None) {
      ++absent;
      plan.leave_out(i);
    } else {
      status = PyList_Append(grads, grad);
      DLTensor tensor;
      if (exchange->tensor_from_object(grad, &tensor) == 0 && !is_negative_view(grad, tensor, is_neg)) {
        offer(plan, i, tensor);
      } else {
        PyErr_Clear();
        plan.refuse();
      }
    }
    Py_DecRef(grad);
    if (status != 0) return -1;
  }
  return absent;
}

// Args:
//   number: of a plan.
//   exchange: the table of torch.Tensor; of version 1.
//   is_neg: that method of torch.Tensor.
//   params: a list of the plan's parameters.
//   grads: a list, to which the gradients are appended: as long as it lives, they do.
//   raise_versions: called without arguments if every parameter has a gradient that can be used: of all that a step
//     asks of Python this takes longest, and here other threads have something else to do.
// Returns: the Outcome, plus 4 for each parameter that has no gradient; -1 with an error set in Python.
// The interpreter's lock is kept, and properties of subclasses may run Python, while other threads look at addresses:
// these must never need the lock, or nobody would go on.
int64_t read_gradients(int64_t number, const DLPackExchange* exchange, PyObject* is_neg, PyObject* params,
                       PyObject* grads, PyObject* raise_versions) {
  try {
    const std::shared_ptr<TensorPlan> plan = plan_of(number);
    STD_TORCH_CHECK(PyList_Size(params) == static_cast<Py_ssize_t>(plan->size()), "another number of parameters");
    int64_t absent = 0;
    const std::optional<Outcome> outcome = plan->check([&] {
      absent = take_gradients(*plan, exchange, is_neg, params, grads);
      if (absent != 0 || !plan->are_usable()) return absent >= 0;
      PyObject* done = PyObject_CallFunctionObjArgs(raise_versions, nullptr);
      Py_DecRef(done);
      return done != nullptr;
    });
    return outcome ? *outcome + 4 * absent : -1;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return -1;
  }
}

// A dict lies in two places, which wait for each other; those of the next ones are fetched meanwhile.
constexpr int kDictsAhead = 8, kKeysAhead = 4;

void fetch_dict(PyObject* dict) { __builtin_prefetch(dict); }

// Whatever should lie there in another version of Python, fetching does no harm.
void fetch_keys(PyObject* dict) {
  if (!PyDict_CheckExact(dict)) return;
  const char* keys = reinterpret_cast<const char* const*>(dict)[4];  // PyDictObject::ma_keys
  for (int line = 0; line < 3; ++line) __builtin_prefetch(keys + 64 * line);
}

void fetch_next(PyObject* states, Py_ssize_t& at, void (*fetch)(PyObject*)) {
  PyObject *param, *state;
  if (PyDict_Next(states, &at, &param, &state)) fetch(state);
}

// Whether the next entries of a dict of dicts, from `at` on, are the very objects of a list; moves behind them.
bool next_are(PyObject* objects, PyObject* states, int64_t entries, Py_ssize_t& at) {
  const Py_ssize_t size = PyList_Size(objects);
  Py_ssize_t next = 0;
  const auto matches = [&](PyObject* object) { return next < size && PyList_GetItem(objects, next++) == object; };
  PyObject *param, *state, *key, *value;
  Py_ssize_t dicts = at, keys = at;
  for (int i = 0; i < kDictsAhead; ++i) fetch_next(states, dicts, fetch_dict);
  for (int i = 0; i < kKeysAhead; ++i) fetch_next(states, keys, fetch_keys);
  for (int64_t i = 0; i < entries && PyDict_Next(states, &at, &param, &state); ++i) {
    fetch_next(states, dicts, fetch_dict);
    fetch_next(states, keys, fetch_keys);
    if (!matches(param) || !matches(state)) return false;
    for (Py_ssize_t inner = 0; PyDict_Next(state, &inner, &key, &value);) {
      if (!matches(key) || !matches(value)) return false;
    }
  }
  return next == size;
}

// Args:
//   states: a dict of dicts.
//   parts: a list of lists of objects (python_calls.objects_of), for threads to share.
//   entries: of the dict, as many as each part is of; the last one of what is left.
// Returns: whether it holds these very objects, in order.
// Other threads read Python's objects here: nobody changes them, for this one keeps the interpreter's lock and waits.
int are_same(PyObject* states, PyObject* parts, int64_t entries) {
  const auto count = static_cast<int64_t>(PyList_Size(parts)), size = static_cast<int64_t>(PyDict_Size(states));
  if (count != (size + entries - 1) / entries) return 0;
  std::atomic<bool> differ{false};
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    PyObject *param, *state;
    Py_ssize_t at = 0;
    for (int64_t skipped = 0; skipped < begin * entries && PyDict_Next(states, &at, &param, &state);) ++skipped;
    for (int64_t i = begin; i < end && !differ; ++i) {
      if (!next_are(PyList_GetItem(parts, static_cast<Py_ssize_t>(i)), states, entries, at)) differ = true;
    }
  });
  return !differ;
}

// Whether two lists hold the same objects.
int are_same_items(PyObject* list, PyObject* other) {
  const Py_ssize_t size = PyList_Size(list);
  if (size != PyList_Size(other)) return 0;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (PyList_GetItem(list, i) != PyList_GetItem(other, i)) return 0;
  }
  return 1;
}

}  // namespace

std::vector<int64_t> python_calls() {
  return {reinterpret_cast<int64_t>(&read_gradients), reinterpret_cast<int64_t>(&are_same),
          reinterpret_cast<int64_t>(&are_same_items)};
}

}  // namespace fused_adaptive
