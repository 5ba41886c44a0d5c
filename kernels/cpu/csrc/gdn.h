// What the entry and the instruction-set files of the Gated DeltaNet kernels share: the call and its sequences.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gdn {

enum Type : int64_t { F32 = 0, BF16_ = 1, F16 = 2 };

// Strides count elements.
struct Call {
    char *core, *z;
    const char *qkvz, *ba;
    int64_t core_row, z_row, qkvz_row, ba_row;
    int64_t hk, hv, k, v, width;
    bool flat;
    char *conv_state, *ssm_state;
    int64_t conv_slot, ssm_slot, slots;
    const char *weights, *bias, *a_log, *dt_bias;
    int64_t io, state, weights_type, bias_type, a_log_type, dt_bias_type;
    int64_t rows, actual, threads;
};

struct Write {
    int64_t token, slot;  // the state after this token of the sequence goes to this slot
};

struct Sequence {
    int64_t first, count;   // rows first .. first + count - 1, or those entries of Work::rows
    int64_t source, final;  // slots; -1: start from zeros, keep nothing
    int64_t writes, writes_end;
};

struct Work {
    const Call* call;
    const Sequence* sequences;
    const int64_t* rows;
    const Write* writes;
    int64_t units;       // sequences x key heads
    const int64_t* order;  // sequence of each rank: long ones first, so that threads end together
};

inline size_t size_of(int64_t type) { return type == F32 ? 4 : 2; }

}  // namespace gdn
