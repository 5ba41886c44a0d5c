// Tensors of Python as C sees them: sizes, strides and memory without a call into Python or the dispatcher.
//
// With caches full of a model's weights, each Python function and each operator of torch on the way to a kernel costs
// microseconds that a warm loop does not show: 200 us before a decode step of 1300, and 10 in this way.
// Only headers of c10 and what they need are included, which compile in 2 s; where a tensor object keeps its TensorImpl
// is found, and checked, when the module is loaded.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/TensorImpl.h>

PyObject* THPVariable_Wrap(const at::TensorBase& var);  // of torch/csrc/autograd/python_variable.h

namespace at {
TORCH_API int get_num_threads();  // of ATen/Parallel.h
}

namespace {

PyTypeObject* tensor_type = nullptr;
Py_ssize_t impl_offset = 0;

// A strided tensor in the memory of the CPU. Anything else (sparse, wrapped, conjugate, a subclass with its own
// dispatch) has further keys, and is for the way through Python.
const uint64_t kPlainKeys = c10::DispatchKeySet(c10::DispatchKey::Dense).raw_repr() |
                            c10::autograd_dispatch_keyset_with_ADInplaceOrView.raw_repr() |
                            c10::autocast_dispatch_keyset.raw_repr() | c10::full_backend_mask;

// The tensor, or null where it is not a plain one of `dims` dims on the CPU.
const c10::TensorImpl* plain(PyObject* value, int64_t dims) {
  if (!PyObject_TypeCheck(value, tensor_type)) return nullptr;
  const c10::TensorImpl* impl = *reinterpret_cast<c10::TensorImpl**>(reinterpret_cast<char*>(value) + impl_offset);
  if ((impl->key_set().raw_repr() & ~kPlainKeys) != 0 || impl->device_type() != c10::DeviceType::CPU) return nullptr;
  return impl->dim() == dims ? impl : nullptr;
}

// An optional number: `none` where it is None. False where it is neither; no Python error is left behind.
bool number(PyObject* value, double none, double& to) {
  if (value == Py_None) {
    to = none;
    return true;
  }
  if (!PyFloat_Check(value) && !PyLong_Check(value)) return false;
  to = PyFloat_AsDouble(value);
  if (to == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return true;
}

// bind_tensors(Tensor, [(tensor, tensor._cdata), ...]): where in a tensor object its TensorImpl* is.
PyObject* bind_tensors(PyObject*, PyObject* args) {
  PyObject *type = nullptr, *samples = nullptr;
  if (!PyArg_ParseTuple(args, "O!O!", &PyType_Type, &type, &PyList_Type, &samples)) return nullptr;
  const Py_ssize_t end = reinterpret_cast<PyTypeObject*>(type)->tp_basicsize, step = sizeof(void*);
  for (Py_ssize_t at = sizeof(PyObject); at + step <= end; at += step) {
    bool all = PyList_GET_SIZE(samples) > 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(samples); ++i) {
      PyObject *object = nullptr, *address = nullptr;
      if (!PyArg_ParseTuple(PyList_GET_ITEM(samples, i), "OO", &object, &address)) return nullptr;
      void* wanted = PyLong_AsVoidPtr(address);
      if (PyErr_Occurred()) return nullptr;
      all = all && *reinterpret_cast<void**>(reinterpret_cast<char*>(object) + at) == wanted;
    }
    if (!all) continue;
    impl_offset = at;
    Py_INCREF(type);
    tensor_type = reinterpret_cast<PyTypeObject*>(type);
    Py_RETURN_NONE;
  }
  PyErr_SetString(PyExc_ImportError, "tensor objects of this torch hold no pointer to their TensorImpl");
  return nullptr;
}

}  // namespace
