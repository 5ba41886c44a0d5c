// Ragged paged attention on the CPU: what the planner (rpa.cpp) and the kernels, one file per instruction set, agree on.
#pragma once
#include <cstdint>

// For what GCC would call although its arguments are in registers: 6% of a decode step.
#define INLINE __attribute__((always_inline)) inline

enum RpaType : int32_t { RPA_F32, RPA_BF16, RPA_F16, RPA_E4M3, RPA_E5M2, RPA_I8 };

// Mirrored field by field in rpa_cpp.py. Strides are in elements; the last dimension of q, out and kv is contiguous.
struct RpaArgs {
  const void* q;
  void* out;           // [tokens, q_heads, head_dim], contiguous
  float* lse;          // [tokens, q_heads] or null
  const void* kv;
  const int32_t* kv_lens;
  const int32_t* pages;
  const int32_t* cu_q_lens;
  const int32_t* num_seqs;
  const float* sinks;  // [q_heads] or null
  int64_t q_token, q_head;
  int64_t kv_page, kv_position, kv_head;  // kv_head: from one combined head to the next
  int64_t pages_row;
  int64_t tokens, max_seqs, pages_per_seq, num_pages, page_size;
  int64_t window;      // 0: none
  int32_t q_heads, kv_heads, head_dim, q_type, kv_type, threads;
  float scale;         // sm_scale * k_scale
  float soft_cap;      // 0: none
  float v_scale;
};

// Query rows row0 .. row0+rows of one sequence, for the query heads of `heads` kv heads from head0 on.
struct RpaTile {
  int32_t seq, row0, rows, head0, heads;
  int32_t first_part, parts;  // parts == 1: the unit writes the output itself
};

// One tile over the cache positions kv0 .. kv1.
struct RpaUnit {
  int32_t tile, part;  // part: index of its partial result, unused if the tile has one part only
  int64_t kv0, kv1;
  double cost;
};

// A unit and its tile; `unit` is null where there is none.
struct RpaWork {
  const RpaTile* tile;
  const RpaUnit* unit;
};

// Partial results of a unit: per row (head-major, then query row, then head of the group) maximum, sum, and `padded`
// accumulators.
struct RpaKernels {
  // `then` is what the same thread does next: its cache rows are asked for before they are needed.
  void (*run)(const RpaArgs&, const RpaTile&, const RpaUnit&, float* partial, const RpaWork& then);
  void (*merge)(const RpaArgs&, const RpaTile&, float* const* partials);
  int32_t width;  // of a vector, in floats: head_dim is padded to a multiple of it
};

// Up to this many rows (query rows x heads of a group) attention streams through the cache once for all heads; from here
// on it is a matrix product per kv head. Measured: packing K and V costs about as much as five rows.
constexpr int RPA_STREAM_ROWS = 8;

// Each library holds one instruction set: the one the processor has best, so that a first call compiles no other.
extern "C" RpaKernels rpa_kernels();

inline int64_t rpa_partial_size(const RpaArgs& a, const RpaTile& t, int width) {
  const int64_t padded = (a.head_dim + width - 1) / width * width;
  return int64_t(t.heads) * t.rows * (a.q_heads / a.kv_heads) * (padded + 2);
}
