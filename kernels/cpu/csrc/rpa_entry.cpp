// The way from Python to the kernels of paged attention: every check of a call, the output and the call itself in one
// function. What is wrong, or merely unusual (a dtype to convert, strides to undo), is answered with None, and the
// functions in Python look at it: they take everything, and they have the words.
#include "tensors.h"

#include <cmath>
#include <exception>
#include <vector>

#include "rpa.h"
#include "rpa_write.h"

namespace {

int32_t (*attention)(const RpaArgs*, const RpaWriteArgs*) = nullptr;
int32_t (*write_rows)(const RpaWriteArgs*) = nullptr;

// As `LARGEST_MASK_VALUE` of reference/paged_attention_check.py.
constexpr double LARGEST_MASK_VALUE = -1e4;

int32_t type_of(const c10::TensorImpl* tensor) {
  switch (tensor->dtype().toScalarType()) {
    case c10::ScalarType::Float: return RPA_F32;
    case c10::ScalarType::BFloat16: return RPA_BF16;
    case c10::ScalarType::Half: return RPA_F16;
    case c10::ScalarType::Float8_e4m3fn: return RPA_E4M3;
    case c10::ScalarType::Float8_e5m2: return RPA_E5M2;
    case c10::ScalarType::Char: return RPA_I8;
    default: return -1;
  }
}

bool is(const c10::TensorImpl* tensor, c10::ScalarType type) { return tensor->dtype().toScalarType() == type; }

bool positive(double value) { return value > 0.0 && std::isfinite(value); }

// Whether a vector has this many elements, side by side; one of none has no memory, so `to` may be null.
template <class T>
bool read_vector(PyObject* value, c10::ScalarType type, int64_t size, const T*& to) {
  const c10::TensorImpl* tensor = plain(value, 1);
  if (tensor == nullptr || !is(tensor, type) || tensor->size(0) != size) return false;
  if (size > 1 && tensor->stride(0) != 1) return false;
  to = static_cast<const T*>(tensor->data());
  return true;
}

struct Cache {
  const c10::TensorImpl* tensor = nullptr;
  int32_t type = 0;
  int64_t pages = 0, page_size = 0, heads = 0, dim = 0, page = 0, position = 0, head = 0;
};

bool read_cache(PyObject* value, PyObject* layout, Cache& to) {
  to.tensor = plain(value, 4);
  if (to.tensor == nullptr || !PyUnicode_Check(layout) || to.tensor->stride(3) != 1) return false;
  const bool nhd = PyUnicode_CompareWithASCIIString(layout, "NHD") == 0;
  if (!nhd && PyUnicode_CompareWithASCIIString(layout, "HND") != 0) return false;
  const int64_t combined = to.tensor->size(nhd ? 2 : 1);
  to.type = type_of(to.tensor);
  to.pages = to.tensor->size(0);
  to.page_size = to.tensor->size(nhd ? 1 : 2);
  to.heads = combined / 2;
  to.dim = to.tensor->size(3);
  to.page = to.tensor->stride(0);
  to.position = to.tensor->stride(nhd ? 1 : 2);
  to.head = to.tensor->stride(nhd ? 2 : 1);
  return to.type >= 0 && to.heads > 0 && combined % 2 == 0 && to.page_size > 0 && to.dim > 0;
}

// Rows of K or V that fit the cache; `tokens` is -1 before the first.
const c10::TensorImpl* read_rows(PyObject* value, const Cache& cache, int64_t& tokens, int32_t& type) {
  const c10::TensorImpl* rows = plain(value, 3);
  if (rows == nullptr || rows->size(1) != cache.heads || rows->size(2) != cache.dim || rows->stride(2) != 1) return nullptr;
  const int32_t its = type_of(rows);
  if (its < 0 || its > RPA_F16) return nullptr;
  if (tokens < 0) {
    tokens = rows->size(0);
    type = its;
  }
  return rows->size(0) == tokens && its == type ? rows : nullptr;
}

bool read_step(PyObject* k, PyObject* v, const Cache& cache, double k_scale, bool k_scaled, double v_scale, bool v_scaled,
               RpaWriteArgs& to) {
  int64_t tokens = -1;
  int32_t type = 0;
  const c10::TensorImpl* keys = read_rows(k, cache, tokens, type);
  const c10::TensorImpl* values = keys == nullptr ? nullptr : read_rows(v, cache, tokens, type);
  if (values == nullptr) return false;
  to.k = keys->data();
  to.v = values->data();
  to.kv = const_cast<c10::TensorImpl*>(cache.tensor)->mutable_data();
  to.slots = nullptr;
  to.k_token = keys->stride(0);
  to.k_head = keys->stride(1);
  to.v_token = values->stride(0);
  to.v_head = values->stride(1);
  to.kv_page = cache.page;
  to.kv_position = cache.position;
  to.kv_head = cache.head;
  to.tokens = tokens;
  to.page_size = cache.page_size;
  to.num_slots = cache.pages * cache.page_size;
  to.kv_heads = int32_t(cache.heads);
  to.head_dim = int32_t(cache.dim);
  to.new_type = type;
  to.kv_type = cache.type;
  to.threads = at::get_num_threads();
  to.k_scaled = k_scaled;
  to.v_scaled = v_scaled;
  to.k_scale = float(k_scale);
  to.v_scale = float(v_scale);
  return true;
}

enum Argument {
  Q, KV_PAGES, KV_LENS, PAGE_INDICES, CU_Q_LENS, NUM_SEQS, SM_SCALE, SLIDING_WINDOW, SOFT_CAP, MASK_VALUE, K_SCALE, V_SCALE,
  KV_LAYOUT, SINKS, LSE, K, V, ARGUMENTS
};

// The call's arguments in `to` and, of an update, `step`; false: not for this way.
bool read_call(PyObject* const* args, RpaArgs& to, RpaWriteArgs& step, Cache& cache, const c10::TensorImpl*& q) {
  double sm_scale = 1.0, soft_cap = 0.0, mask_value = LARGEST_MASK_VALUE, k_scale = 1.0, v_scale = 1.0;
  if (args[SM_SCALE] == Py_None || !number(args[SM_SCALE], 1.0, sm_scale) || !std::isfinite(sm_scale)) return false;
  if (!number(args[SOFT_CAP], 0.0, soft_cap) || (args[SOFT_CAP] != Py_None && !positive(soft_cap))) return false;
  if (!number(args[MASK_VALUE], LARGEST_MASK_VALUE, mask_value) || !(mask_value <= LARGEST_MASK_VALUE)) return false;
  if (!number(args[K_SCALE], 1.0, k_scale) || !positive(k_scale)) return false;
  if (!number(args[V_SCALE], 1.0, v_scale) || !positive(v_scale)) return false;
  to.window = 0;
  if (args[SLIDING_WINDOW] != Py_None) {
    if (!PyLong_Check(args[SLIDING_WINDOW])) return false;
    int overflow = 0;  // then the answer is -1
    to.window = PyLong_AsLongLongAndOverflow(args[SLIDING_WINDOW], &overflow);
    if (to.window <= 0) return false;
  }
  q = plain(args[Q], 3);
  if (q == nullptr || !read_cache(args[KV_PAGES], args[KV_LAYOUT], cache)) return false;
  to.q_type = type_of(q);
  const int64_t q_heads = q->size(1);
  if (to.q_type < 0 || to.q_type > RPA_F16 || q->stride(2) != 1 || q->size(2) != cache.dim) return false;
  if (q_heads == 0 || q_heads % cache.heads != 0) return false;
  const c10::TensorImpl* table = plain(args[PAGE_INDICES], 2);
  if (table == nullptr || !is(table, c10::ScalarType::Int)) return false;
  if (table->size(1) > 1 && table->stride(1) != 1) return false;
  to.max_seqs = table->size(0);
  if (!read_vector(args[KV_LENS], c10::ScalarType::Int, to.max_seqs, to.kv_lens)) return false;
  if (!read_vector(args[CU_Q_LENS], c10::ScalarType::Int, to.max_seqs + 1, to.cu_q_lens)) return false;
  if (!read_vector(args[NUM_SEQS], c10::ScalarType::Int, 1, to.num_seqs)) return false;
  to.sinks = nullptr;
  if (args[SINKS] != Py_None && !read_vector(args[SINKS], c10::ScalarType::Float, q_heads, to.sinks)) return false;
  to.q = q->data();
  to.kv = cache.tensor->data();
  to.pages = static_cast<const int32_t*>(table->data());
  to.q_token = q->stride(0);
  to.q_head = q->stride(1);
  to.kv_page = cache.page;
  to.kv_position = cache.position;
  to.kv_head = cache.head;
  to.pages_row = table->stride(0);
  to.tokens = q->size(0);
  to.pages_per_seq = table->size(1);
  to.num_pages = cache.pages;
  to.page_size = cache.page_size;
  to.q_heads = int32_t(q_heads);
  to.kv_heads = int32_t(cache.heads);
  to.head_dim = int32_t(cache.dim);
  to.kv_type = cache.type;
  to.threads = at::get_num_threads();
  to.scale = float(sm_scale * k_scale);
  to.soft_cap = float(soft_cap);
  to.v_scale = float(v_scale);
  if (args[K] == Py_None) return true;
  const bool k_scaled = args[K_SCALE] != Py_None, v_scaled = args[V_SCALE] != Py_None;
  if (!read_step(args[K], args[V], cache, k_scale, k_scaled, v_scale, v_scaled, step)) return false;
  to.kv = step.kv;  // memory that was shared until a first write is another from then on
  return step.tokens == to.tokens;
}

PyObject* attend_plain(PyObject* const* args) {
  RpaArgs call{};
  RpaWriteArgs step{};
  Cache cache;
  const c10::TensorImpl* q = nullptr;
  if (!read_call(args, call, step, cache, q)) Py_RETURN_NONE;
  const bool with_lse = args[LSE] == Py_True;
  const at::TensorBase out = at::detail::empty_cpu(q->sizes(), q->dtype().toScalarType());
  at::TensorBase lse;
  call.out = out.mutable_data_ptr();
  if (with_lse) {
    lse = at::detail::empty_cpu(q->sizes().slice(0, 2), c10::ScalarType::Float);
    call.lse = static_cast<float*>(lse.mutable_data_ptr());
  }
  int32_t wrong = 0;
  Py_BEGIN_ALLOW_THREADS;
  wrong = attention(&call, args[K] == Py_None ? nullptr : &step);
  Py_END_ALLOW_THREADS;
  if (wrong != 0) Py_RETURN_NONE;
  if (!with_lse) return THPVariable_Wrap(out);
  PyObject* both[] = {THPVariable_Wrap(out), THPVariable_Wrap(lse)};
  PyObject* pair = both[0] == nullptr || both[1] == nullptr ? nullptr : PyTuple_Pack(2, both[0], both[1]);
  Py_XDECREF(both[0]);
  Py_XDECREF(both[1]);
  return pair;
}

// The arguments of write.
enum { NEW_K, NEW_V, PAGES, SLOTS, LAYOUT, K_BY, V_BY, WRITE_ARGUMENTS };

PyObject* write_plain(PyObject* const* args) {
  double k_scale = 1.0, v_scale = 1.0;
  if (!number(args[K_BY], 1.0, k_scale) || !positive(k_scale)) Py_RETURN_NONE;
  if (!number(args[V_BY], 1.0, v_scale) || !positive(v_scale)) Py_RETURN_NONE;
  Cache cache;
  RpaWriteArgs step{};
  if (!read_cache(args[PAGES], args[LAYOUT], cache)) Py_RETURN_NONE;
  if (!read_step(args[NEW_K], args[NEW_V], cache, k_scale, args[K_BY] != Py_None, v_scale, args[V_BY] != Py_None, step)) {
    Py_RETURN_NONE;
  }
  std::vector<int64_t> widened;
  const int32_t* narrow = nullptr;
  if (read_vector(args[SLOTS], c10::ScalarType::Int, step.tokens, narrow)) {
    widened.assign(narrow, narrow + step.tokens);
    step.slots = widened.data();
  } else if (!read_vector(args[SLOTS], c10::ScalarType::Long, step.tokens, step.slots)) {
    Py_RETURN_NONE;
  }
  int32_t wrong = 0;
  Py_BEGIN_ALLOW_THREADS;
  wrong = write_rows(&step);
  Py_END_ALLOW_THREADS;
  if (wrong != 0) Py_RETURN_NONE;
  Py_RETURN_TRUE;
}

template <PyObject* (*F)(PyObject* const*), int WANTED>
PyObject* guarded(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != WANTED || attention == nullptr) {
    PyErr_Format(PyExc_TypeError, "%d positional arguments after bind(), not %zd", WANTED, count);
    return nullptr;
  }
  try {
    return F(args);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// bind(address of rpa_attention, address of rpa_write): the kernels that this processor runs best.
PyObject* bind(PyObject*, PyObject* args) {
  unsigned long long attention_at = 0, write_at = 0;
  if (!PyArg_ParseTuple(args, "KK", &attention_at, &write_at)) return nullptr;
  attention = reinterpret_cast<decltype(attention)>(static_cast<uintptr_t>(attention_at));
  write_rows = reinterpret_cast<decltype(write_rows)>(static_cast<uintptr_t>(write_at));
  Py_RETURN_NONE;
}

template <PyObject* (*F)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction fast() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(F));
}

PyMethodDef functions[] = {
    {"bind_tensors", bind_tensors, METH_VARARGS, "Tell the module torch's type of tensors."},
    {"bind", bind, METH_VARARGS, "Tell the module where the kernels are."},
    {"attend", fast<guarded<attend_plain, ARGUMENTS>>(), METH_FASTCALL,
     "The operator's arguments in order, lse (bool), k and v (or None): what it returns, or None."},
    {"write", fast<guarded<write_plain, WRITE_ARGUMENTS>>(), METH_FASTCALL,
     "The arguments of kv_cache_update in order: True if they were written, or None."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "rpa_entry", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_rpa_entry() { return PyModule_Create(&module); }
