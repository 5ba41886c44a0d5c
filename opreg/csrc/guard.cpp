// Is a call plain eager, and which function takes it? One C call in place of a dozen questions asked from Python.
//
// Only headers of c10 are included: with those of torch/csrc this file takes 15 s to compile, so 1.5 s. What they would
// say about Python's tensor object is found, and checked, when the module is loaded (see bind).

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/GradMode.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <exception>
#include <string>

namespace at {
TORCH_API bool hasCallbacks();  // of ATen/record_function.h: profilers and execution traces observe operators
}

namespace {

PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
PyObject* implementations = nullptr;  // torch's set of what has been registered through torch.library
PyObject* forward_ad = nullptr;       // the globals of torch.autograd.forward_ad
PyObject* current_level = nullptr;    // "_current_level"
Py_ssize_t offset = 0;                // of the TensorImpl* in a tensor object

const uint64_t kInPlaceOrView = c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView).raw_repr();
const uint64_t kAutograd = c10::autograd_dispatch_keyset_with_ADInplaceOrView.raw_repr();
const uint64_t kAutocast = c10::autocast_dispatch_keyset.raw_repr();

// A strided tensor in memory of some device. Not in here, and so for the dispatcher: sparse, quantized, nested, mkldnn,
// conjugate and negative views, wrappers of functorch and of functionalization, Python subclasses.
const uint64_t kPlainTensor =
    c10::DispatchKeySet(c10::DispatchKey::Dense).raw_repr() | kAutograd | kAutocast | c10::full_backend_mask;

// Dispatch modes, functorch, tracing, functionalization and the Python dispatcher all show in this thread's key sets.
// Inference mode takes ADInplaceOrView out and excludes autograd, which kernels below autograd do, too. Autocast keys
// matter only to who registered one for the operator, which `implementations` tells.
bool plain_thread() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const uint64_t included = keys.included_.raw_repr() ^ c10::default_included_set.raw_repr();
  const uint64_t excluded = keys.excluded_.raw_repr() ^ c10::default_excluded_set.raw_repr();
  return (included & ~kInPlaceOrView) == 0 && (excluded & ~(kAutograd | kAutocast)) == 0 &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 && !at::hasCallbacks();
}

c10::TensorImpl* impl_of(PyObject* tensor) {
  return *reinterpret_cast<c10::TensorImpl**>(reinterpret_cast<char*>(tensor) + offset);
}

bool is_exact(PyObject* value) {
  return Py_TYPE(value) == tensor_type || Py_TYPE(value) == parameter_type;
}

struct Pick {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject* runs[c10::COMPILE_TIME_MAX_DEVICE_TYPES];  // what takes a call, by type of device
  PyObject* look;      // called when `implementations` has changed, and sets `seen`
  Py_ssize_t seen;     // size of `implementations` when none was found to be in the way
  Py_ssize_t first;    // which argument's device decides
  Py_ssize_t count;
  bool outside;        // asked for in place of the dispatcher, or by it
  bool grads;          // whether a wanted gradient is in the way
  char kinds[64];      // per argument: 't' a tensor, 'o' a tensor or None, 'l' a list of those, 'm' a list or None
};

// Whether this value, an argument or an item of one, is in the way.
bool hinders(const Pick* self, PyObject* value, char kind, bool grad_mode) {
  if (value == Py_None) {
    return kind == 't';
  }
  if (self->outside ? !is_exact(value) : !PyObject_TypeCheck(value, tensor_type)) {
    return true;
  }
  const c10::TensorImpl* impl = impl_of(value);
  if (self->outside && (impl->key_set().raw_repr() & ~kPlainTensor) != 0) {
    return true;
  }
  return grad_mode && impl->requires_grad();
}

// Whether some caller computes forward-mode derivatives, so that tensors may carry tangents.
bool in_dual_level() {
  PyObject* level = PyDict_GetItem(forward_ad, current_level);
  return level == nullptr || !PyLong_Check(level) || PyLong_AsLong(level) >= 0;
}

PyObject* choose(const Pick* self, PyObject* const* args) {
  if (in_dual_level()) {
    return Py_None;
  }
  if (self->outside) {
    if (self->seen != PySet_GET_SIZE(implementations)) {
      PyObject* done = PyObject_CallNoArgs(self->look);
      Py_XDECREF(done);
      return done == nullptr ? nullptr : Py_None;
    }
    if (!plain_thread()) {
      return Py_None;
    }
  }
  const bool grad_mode = self->grads && c10::GradMode::is_enabled();
  for (Py_ssize_t i = 0; i < self->count; ++i) {
    PyObject* value = args[i];
    if (self->kinds[i] == 't' || self->kinds[i] == 'o') {
      if (hinders(self, value, self->kinds[i], grad_mode)) {
        return Py_None;
      }
      continue;
    }
    if (value == Py_None && self->kinds[i] == 'm') {
      continue;
    }
    if (!PyList_Check(value) && !PyTuple_Check(value)) {
      return Py_None;
    }
    PyObject** items = PySequence_Fast_ITEMS(value);
    for (Py_ssize_t j = 0; j < PySequence_Fast_GET_SIZE(value); ++j) {
      if (hinders(self, items[j], 'o', grad_mode)) {
        return Py_None;
      }
    }
  }
  PyObject* run = self->runs[static_cast<size_t>(impl_of(args[self->first])->device_type())];
  return run == nullptr ? Py_None : run;
}

PyObject* pick_call(PyObject* object, PyObject* const* args, size_t nargsf, PyObject* keywords) {
  const Pick* self = reinterpret_cast<const Pick*>(object);
  if (PyVectorcall_NARGS(nargsf) != self->count || keywords != nullptr) {
    PyErr_Format(PyExc_TypeError, "Pick takes %zd positional arguments", self->count);
    return nullptr;
  }
  try {
    PyObject* run = choose(self, args);
    Py_XINCREF(run);
    return run;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* pick_new(PyTypeObject* type, PyObject* args, PyObject*) {
  const char* kinds = nullptr;
  Py_ssize_t count = 0, first = 0;
  int outside = 0, grads = 0;
  PyObject* look = nullptr;
  if (!PyArg_ParseTuple(args, "s#nppO", &kinds, &count, &first, &outside, &grads, &look)) {
    return nullptr;
  }
  if (count > static_cast<Py_ssize_t>(sizeof(Pick::kinds)) || first < 0 || first >= count || kinds[first] != 't') {
    PyErr_SetString(PyExc_ValueError, "Pick: too many tensors, or the first is none");
    return nullptr;
  }
  Pick* self = reinterpret_cast<Pick*>(type->tp_alloc(type, 0));
  if (self == nullptr) {
    return nullptr;
  }
  self->call = pick_call;
  Py_INCREF(look);
  self->look = look;
  self->seen = -1;
  self->first = first;
  self->count = count;
  self->outside = outside != 0;
  self->grads = grads != 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    self->kinds[i] = kinds[i];
  }
  return reinterpret_cast<PyObject*>(self);
}

void pick_forget(Pick* self) {
  for (PyObject*& run : self->runs) {
    Py_CLEAR(run);
  }
}

void pick_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  pick_forget(reinterpret_cast<Pick*>(self));
  Py_XDECREF(reinterpret_cast<Pick*>(self)->look);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* pick_set(PyObject* self, PyObject* args) {
  const char* device_type = nullptr;
  PyObject* run = nullptr;
  if (!PyArg_ParseTuple(args, "sO", &device_type, &run)) {
    return nullptr;
  }
  try {
    PyObject*& slot = reinterpret_cast<Pick*>(self)->runs[static_cast<size_t>(c10::Device(device_type).type())];
    Py_INCREF(run);
    Py_XSETREF(slot, run);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* pick_clear(PyObject* self, PyObject*) {
  pick_forget(reinterpret_cast<Pick*>(self));
  Py_RETURN_NONE;
}

PyMethodDef pick_methods[] = {
    {"set", pick_set, METH_VARARGS, "set(device_type, run): what takes calls on tensors of this type of device"},
    {"clear", pick_clear, METH_NOARGS, "Forget what was set."},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef pick_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Pick, call), READONLY, nullptr},
    {"seen", T_PYSSIZET, offsetof(Pick, seen), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot pick_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(pick_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(pick_dealloc)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, pick_methods},
    {Py_tp_members, pick_members},
    {0, nullptr},
};

PyType_Spec pick_spec = {
    "opreg_guard.Pick", sizeof(Pick), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, pick_slots};

// bind(Tensor, Parameter, implementations, vars(forward_ad), [(tensor, tensor._cdata), ...]): where in a tensor object its TensorImpl* is.
PyObject* bind(PyObject*, PyObject* args) {
  PyObject *tensor = nullptr, *parameter = nullptr, *registered = nullptr, *duals = nullptr, *samples = nullptr;
  if (!PyArg_ParseTuple(args, "O!O!O!O!O!", &PyType_Type, &tensor, &PyType_Type, &parameter, &PySet_Type, &registered,
                        &PyDict_Type, &duals, &PyList_Type, &samples)) {
    return nullptr;
  }
  current_level = PyUnicode_InternFromString("_current_level");
  if (current_level == nullptr) {
    return nullptr;
  }
  const Py_ssize_t end = reinterpret_cast<PyTypeObject*>(tensor)->tp_basicsize;
  Py_ssize_t found = 0;
  for (Py_ssize_t at = sizeof(PyObject); at + static_cast<Py_ssize_t>(sizeof(void*)) <= end; at += sizeof(void*)) {
    bool all = PyList_GET_SIZE(samples) > 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(samples); ++i) {
      PyObject* sample = PyList_GET_ITEM(samples, i);
      PyObject* object = PyTuple_GetItem(sample, 0);
      PyObject* address = object == nullptr ? nullptr : PyTuple_GetItem(sample, 1);
      void* wanted = address == nullptr ? nullptr : PyLong_AsVoidPtr(address);
      if (wanted == nullptr) {
        return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_ValueError, "a sample without address");
      }
      all = all && *reinterpret_cast<void**>(reinterpret_cast<char*>(object) + at) == wanted;
    }
    if (all) {
      found = at;
      break;
    }
  }
  if (found == 0) {
    return PyErr_Format(PyExc_RuntimeError, "tensor objects of this torch hold no pointer to their TensorImpl");
  }
  offset = found;
  Py_INCREF(tensor);
  Py_INCREF(parameter);
  Py_INCREF(registered);
  Py_INCREF(duals);
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  implementations = registered;
  forward_ad = duals;
  Py_RETURN_NONE;
}

void count_write(PyObject* value) {
  if (PyObject_TypeCheck(value, tensor_type)) {
    c10::TensorImpl* impl = impl_of(value);
    if (!impl->is_inference()) {  // such tensors have no count, and no backward can have saved them
      impl->bump_version();
    }
  }
}

// wrote(out, [a, b], None, ...): where grad mode is on, count one write of each tensor, as torch's own operators do.
PyObject* wrote(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!c10::GradMode::is_enabled()) {
    Py_RETURN_NONE;
  }
  try {
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (PyList_Check(args[i]) || PyTuple_Check(args[i])) {
        for (Py_ssize_t j = 0; j < PySequence_Fast_GET_SIZE(args[i]); ++j) {
          count_write(PySequence_Fast_GET_ITEM(args[i], j));
        }
      } else {
        count_write(args[i]);
      }
    }
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"wrote", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(wrote)), METH_FASTCALL,
     "Count one write of each tensor, where grad mode is on."},
    {"bind", bind, METH_VARARGS, "Tell the module torch's types; must come before the first Pick is called."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "opreg_guard", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_opreg_guard() {
  PyObject* made = PyModule_Create(&module);
  PyObject* type = made == nullptr ? nullptr : PyType_FromSpec(&pick_spec);
  if (type == nullptr || PyModule_AddObject(made, "Pick", type) < 0) {
    Py_XDECREF(type);
    Py_XDECREF(made);
    return nullptr;
  }
  return made;
}
