// Tensors and numbers of a call, read where Python keeps them. From Python, asking 17 tensors for what a kernel needs to
// know costs a decode step 100 us of 400 where the caches are cold; this costs a tenth of that. No headers of Python or
// torch are needed, and one build serves every version of both: what is called is looked up when the library is loaded,
// among functions that both promise to keep (Python's stable ABI, the C interface that AOTInductor's libraries use).
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace host {

using Object = void;

// In the order of host.py.
struct Table {
    int64_t (*as_integer)(Object*);      // PyLong_AsLongLong
    Object* (*from_integer)(long);       // PyLong_FromLong
    int (*is_true)(Object*);             // PyObject_IsTrue
    const char* (*as_text)(Object*, int64_t*);  // PyUnicode_AsUTF8AndSize
    int (*is_instance)(Object*, Object*);       // PyObject_IsInstance
    Object* (*error)();                  // PyErr_Occurred
    void (*forget_error)();              // PyErr_Clear
    void* (*release_lock)();             // PyEval_SaveThread
    void (*take_lock)(void*);            // PyEval_RestoreThread
    int32_t (*data)(void*, void**);      // aoti_torch_get_data_ptr; these return 0 where they could
    int32_t (*rank)(void*, int64_t*);
    int32_t (*sizes)(void*, int64_t**);
    int32_t (*strides)(void*, int64_t**);
    int32_t (*type)(void*, int32_t*);
    int32_t (*device)(void*, int32_t*);
    Object *none, *tensor_type;
    int64_t offset;                      // of the TensorImpl* in a tensor object
    int64_t keys;                        // of the dispatch keys in a TensorImpl
    uint64_t lazy;                       // keys of negative and conjugate views, whose memory holds other values
};

// Numbers of c10::ScalarType, which saved files keep.
enum Scalar : int32_t { INT32 = 3, INT64 = 4, FLOAT16 = 5, FLOAT32 = 6, BOOL = 11, BFLOAT16 = 15 };

struct Tensor {
    char* data = nullptr;
    int64_t rank = -1;  // -1: there is none
    const int64_t *sizes = nullptr, *strides = nullptr;
    int32_t type = -1;

    bool given() const { return rank >= 0; }
    bool is(std::initializer_list<int64_t> wanted) const {
        return rank == int64_t(wanted.size()) && std::equal(wanted.begin(), wanted.end(), sizes);
    }
    // Dense from dimension `first` on.
    bool dense(int64_t first = 0) const {
        int64_t expected = 1;
        for (int64_t i = 0; i < rank; i++)
            if (!sizes[i]) return true;  // any strides: numpy gives zeros
        for (int64_t i = rank - 1; i >= first; i--) {
            if (sizes[i] != 1 && strides[i] != expected) return false;
            expected *= sizes[i];
        }
        return true;
    }
};

// The arguments of one call. What is not as it must be makes `wrong` true; whoever called finds words for it.
struct Arguments {
    const Table& table;
    Object* const* args;
    bool wrong = false;

    void* impl(int64_t i) const { return *reinterpret_cast<void**>(static_cast<char*>(args[i]) + table.offset); }

    // Asks for all tensors at once: one after the other, each is a chain of places that are not in the cache.
    void expect(std::initializer_list<int> tensors) const {
        for (const int i : tensors) __builtin_prefetch(static_cast<char*>(args[i]) + table.offset);
        for (const int i : tensors)
            if (args[i] != table.none && table.is_instance(args[i], table.tensor_type) == 1)
                for (int at = 0; at < 192; at += 64) __builtin_prefetch(static_cast<char*>(impl(i)) + at);
    }
    int64_t integer(int64_t i) {
        const int64_t value = table.as_integer(args[i]);
        if (value == -1 && table.error()) refuse();
        return value;
    }
    bool truth(int64_t i) {
        const int value = table.is_true(args[i]);
        if (value < 0) refuse();
        return value > 0;
    }
    bool none(int64_t i) const { return args[i] == table.none; }
    // A tensor in this machine's memory; None where it may be.
    Tensor tensor(int64_t i, bool optional = false) {
        Tensor t;
        if (none(i)) {
            wrong |= !optional;
            return t;
        }
        if (table.is_instance(args[i], table.tensor_type) != 1) return refuse(), t;
        void* handle[] = {impl(i)};  // an at::Tensor is this pointer
        int32_t device = -1;
        int64_t *sizes = nullptr, *strides = nullptr;
        void* data = nullptr;
        uint64_t keys;
        __builtin_memcpy(&keys, static_cast<char*>(handle[0]) + table.keys, sizeof keys);
        if ((keys & table.lazy) || table.device(handle, &device) || device != 0 || table.rank(handle, &t.rank) || table.sizes(handle, &sizes) ||
            table.strides(handle, &strides) || table.type(handle, &t.type) || table.data(handle, &data))
            return refuse(), Tensor();
        t.data = static_cast<char*>(data);
        t.sizes = sizes;
        t.strides = strides;
        return t;
    }
    void refuse() {
        wrong = true;
        if (table.error()) table.forget_error();
    }
};

// A vector of indices or of truth values, of any stride.
struct Vector {
    const char* data = nullptr;
    int64_t size = 0, step = 1;
    int32_t type = -1;

    explicit Vector(const Tensor& t) {
        if (t.rank != 1) return;
        data = t.data;
        size = t.sizes[0];
        step = t.strides[0];
        type = t.type;
    }
    bool indices(int64_t count) const { return (type == INT32 || type == INT64) && size >= count; }
    bool truths(int64_t count) const { return type == BOOL && size >= count; }
    int64_t operator[](int64_t i) const {
        i *= step;
        return type == INT64   ? reinterpret_cast<const int64_t*>(data)[i]
               : type == INT32 ? int64_t(reinterpret_cast<const int32_t*>(data)[i])
                               : int64_t(data[i]);
    }
};

}  // namespace host
