// Accesses to Python objects in every step; no other file in csrc/ uses Python. fused_adaptive/core/python_calls.py
// calls the functions with the GIL held. They read tensors through the function table of the DLPack standard, which
// torch.Tensor provides. That takes some tens of nanoseconds, an argument of an operator several times as long.
#include <Python.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "plan/tensors.h"

// The interpreter provides these symbols. They are weak since the library is not linked with libpython.
#pragma weak PyDict_Next
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
#pragma weak PyType_GetFlags
#pragma weak _Py_FalseStruct
#pragma weak _Py_NoneStruct

namespace fused_adaptive {
namespace {

// Structs of DLPack 1 that are needed here.
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

View view_of(const DLTensor& tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  View view;
  const bool is_known = tensor.device.type == kDLCPU || tensor.device.type == kDLCUDA;
  DType dtype;
  if (is_known && dtype_of(tensor, dtype) && (tensor.ndim == 0 || tensor.strides != nullptr)) view.dtype = dtype;
  view.at = tensor.data == nullptr ? nullptr : static_cast<const char*>(tensor.data) + tensor.byte_offset;
  view.device_type = tensor.device.type == kDLCPU ? cpu : cuda;
  view.device_index = tensor.device.index;
  view.dims = tensor.ndim;
  view.sizes = tensor.shape;
  view.strides = tensor.strides;
  return view;
}

// Returns whether the tensor is a view with the negative bit, which DLPack does not report. Such views are parts of
// complex tensors and use every other number in memory, so only those with one element look dense.
bool is_negative_view(PyObject* object, const DLTensor& tensor, PyObject* is_neg) {
  if (std::any_of(tensor.shape, tensor.shape + tensor.ndim, [](int64_t size) { return size != 1; })) return false;
  PyObject* found = PyObject_CallFunctionObjArgs(is_neg, object, nullptr);
  Py_DecRef(found);  // accepts null
  return found != Py_False;
}

// Return values of read_gradients besides those with a Readiness.
enum : int64_t { kRaised = -1, kUnreadable = -2 };

// Checks the tensors of the plan, takes the gradients of its parameters and appends them to a list. Returns the number
// of parameters without a gradient, or kRaised or kUnreadable.
int64_t take_gradients(TensorPlan& plan, const DLPackExchange* exchange, PyObject* is_neg, PyObject* held,
                       PyObject* grads) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  int64_t absent = 0;
  Py_ssize_t next = 0;
  DLTensor tensor;
  for (size_t i = 0; i < plan.size(); ++i) {
    PyObject* const param = PyList_GetItem(held, next);
    for (size_t k = 0; k < plan.tensors_of(i); ++k) {
      if (exchange->tensor_from_object(PyList_GetItem(held, next++), &tensor) != 0) {
        PyErr_Clear();
        return kUnreadable;
      }
      plan.look_at(i, k, view_of(tensor));
    }
    PyObject* grad = PyObject_GetAttr(param, name);
    if (grad == nullptr) return kRaised;
    int status = 0;
    if (grad == Py_None) {
      ++absent;
      plan.leave_out(i);
    } else {
      status = PyList_Append(grads, grad);
      if (exchange->tensor_from_object(grad, &tensor) == 0 && !is_negative_view(grad, tensor, is_neg)) {
        plan.take(i, view_of(tensor));
      } else {
        PyErr_Clear();
        plan.refuse();
      }
    }
    Py_DecRef(grad);
    if (status != 0) return kRaised;
  }
  return absent;
}

// Checks the plan before a step and takes its gradients.
//
// Args:
//   number: number of the plan.
//   exchange: DLPack table of torch.Tensor, version 1.
//   is_neg: method torch.Tensor.is_neg.
//   held: list of the plan's parameters, each followed by its state in the order of binding.
//   grads: list to which the gradients are appended. It keeps them alive.
// Returns:
//   the Readiness plus 4 times the number of parameters without a gradient; kUnreadable if DLPack cannot read a tensor;
//   kRaised with an error set in Python.
int64_t read_gradients(int64_t number, const DLPackExchange* exchange, PyObject* is_neg, PyObject* held,
                       PyObject* grads) {
  try {
    const std::shared_ptr<TensorPlan> plan = plan_of(number);
    plan->begin_check();
    const int64_t absent = take_gradients(*plan, exchange, is_neg, held, grads);
    return absent < 0 ? absent : plan->end_check() + 4 * absent;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return kRaised;
  }
}

// Returns whether a dict of dicts holds the same objects as a list (python_calls.objects_of), in the same order.
int are_same(PyObject* states, PyObject* objects) {
  const Py_ssize_t size = PyList_Size(objects);
  Py_ssize_t next = 0, at = 0;
  const auto matches = [&](PyObject* object) { return next < size && PyList_GetItem(objects, next++) == object; };
  PyObject *param, *state, *key, *value;
  while (PyDict_Next(states, &at, &param, &state)) {
    if (!matches(param) || !matches(state)) return 0;
    for (Py_ssize_t inner = 0; PyDict_Check(state) && PyDict_Next(state, &inner, &key, &value);) {
      if (!matches(key) || !matches(value)) return 0;
    }
  }
  return next == size;
}

// Returns whether two lists hold the same objects.
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
