// What both ways of computing share: reading rows, exp2, the online softmax's bookkeeping, writing results. Included after
// one of the vector headers; everything is local to the file that includes it, so that no code compiled for one
// instruction set can be linked into another.
#pragma once
#include <cstdlib>
#include <cstring>

#include "rpa.h"

namespace {

constexpr float LOWEST = -1e30f;  // running maximum before any score: finite, so that differences are
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

// Into the second-level cache. Not the builtin: GCC 12 takes a function of nothing but prefetches for one without
// effect and drops the calls.
inline void prefetch(const char* at) { asm volatile("prefetcht1 %0" : : "m"(*at)); }

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t size_of(int type) { return type == RPA_F32 ? 4 : type <= RPA_F16 ? 2 : 1; }

// 2^x for x <= 0, relative error 1e-7: polynomial of 2^f on [-1/2, 1/2].
inline vf vexp2(vf x) {
  x = vmax(vset(-150.0f), x);  // this order keeps NaN
  const vf n = vround(x), f = vsub(x, n);
  vf p = vfma(vset(1.53707059e-4f), f, vset(1.33998492e-3f));
  p = vfma(p, f, vset(9.61837325e-3f));
  p = vfma(p, f, vset(5.55032903e-2f));
  p = vfma(p, f, vset(2.40226485e-1f));
  p = vfma(p, f, vset(6.93147206e-1f));
  p = vfma(p, f, vset(1.0f));
  return vmul(p, vpow2(n));
}

// tanh: the odd series near zero, where 1 - 2 / (e^2x + 1) cancels.
inline vf vtanh(vf x) {
  const vf a = vabs(x), s = vmul(x, x);
  vf p = vfma(vset(-8.863236e-3f), s, vset(2.1869489e-2f));
  p = vfma(p, s, vset(-5.3968254e-2f));
  p = vfma(p, s, vset(1.3333333e-1f));
  p = vfma(p, s, vset(-3.3333333e-1f));
  const vf small = vfma(vmul(p, s), x, x);
  const vf e = vexp2(vmul(a, vset(-2.0f * LOG2E)));
  const vf large = vdiv(vsub(vset(1.0f), e), vadd(vset(1.0f), e));
  return vless(a, vset(0.4f), small, vless(x, vzero(), vsub(vzero(), large), large));
}

// Logit in powers of two. Without a cap `by` is scale * log2(e); with one it is scale / cap, and `cap` is cap * log2(e).
inline vf vlogit(vf dot, vf by, bool capped, vf cap) {
  const vf x = vmul(dot, by);
  return capped ? vmul(vtanh(x), cap) : x;
}

struct Logit {
  bool capped;
  float by, cap;
  explicit Logit(const RpaArgs& a)
      : capped(a.soft_cap > 0), by(capped ? a.scale / a.soft_cap : a.scale * LOG2E), cap(a.soft_cap * LOG2E) {}
};

// Memory of one thread, kept between calls.
struct Scratch {
  char* data = nullptr;
  int64_t size = 0, used = 0;
  ~Scratch() { std::free(data); }
  void reserve(int64_t bytes) {
    used = 0;
    if (bytes <= size) return;
    std::free(data);
    size = round_up(bytes, 4096);
    data = static_cast<char*>(std::aligned_alloc(64, size));
    if (data == nullptr) std::abort();
  }
  template <class T>
  T* take(int64_t count) {
    T* here = reinterpret_cast<T*>(data + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return here;
  }
  static int64_t bytes(int64_t floats) { return round_up(floats * 4, 64); }
};

struct Sequence {
  const int32_t* pages;
  int64_t q_start, q_len, kv_len;
  Sequence(const RpaArgs& a, int seq)
      : pages(a.pages + seq * a.pages_row),
        q_start(a.cu_q_lens[seq]),
        q_len(a.cu_q_lens[seq + 1] - a.cu_q_lens[seq]),
        kv_len(a.kv_lens[seq]) {}
  // Address of a position's combined heads.
  const char* row(const RpaArgs& a, int64_t position, int64_t item) const {
    const int64_t page = position / a.page_size, offset = position - page * a.page_size;
    return static_cast<const char*>(a.kv) + (pages[page] * a.kv_page + offset * a.kv_position) * item;
  }
};

// Addresses of `count` rows from `position` on.
inline void row_addresses(const RpaArgs& a, const Sequence& s, int64_t position, int count, int64_t item, const char** to) {
  int64_t offset = position % a.page_size;
  const char* at = s.row(a, position, item);
  for (int n = 0; n < count; ++n) {
    to[n] = at;
    at += a.kv_position * item;
    if (++offset == a.page_size && n + 1 < count) {
      offset = 0;
      at = s.row(a, position + n + 1, item);
    }
  }
}

// One query row in float32, zero-padded to `padded`.
template <int T>
inline void read_query_as(const void* row, int64_t dim, int64_t padded, float* to) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) vstore(to + d, vread<T>(row, d));
  if (d == padded) return;
  alignas(64) char tail[64] = {0};
  std::memcpy(tail, static_cast<const char*>(row) + d * size_of(T), (dim - d) * size_of(T));
  vstore(to + d, vread<T>(tail, 0));
}

inline void read_query(const RpaArgs& a, int64_t token, int64_t head, int64_t padded, float* to) {
  const char* row = static_cast<const char*>(a.q) + (token * a.q_token + head * a.q_head) * size_of(a.q_type);
  if (a.q_type == RPA_F32) read_query_as<RPA_F32>(row, a.head_dim, padded, to);
  if (a.q_type == RPA_BF16) read_query_as<RPA_BF16>(row, a.head_dim, padded, to);
  if (a.q_type == RPA_F16) read_query_as<RPA_F16>(row, a.head_dim, padded, to);
}

// Output and log-sum-exp of one row: top and sum are the softmax's maximum (in powers of two) and denominator.
inline void write_row(const RpaArgs& a, int64_t token, int64_t head, float top, float sum, const float* acc) {
  float by = 1.0f;
  if (a.sinks != nullptr) {
    const float sink = a.sinks[head] * LOG2E, high = sink > top ? sink : top;
    by = __builtin_exp2f(top - high);
    sum = sum * by + __builtin_exp2f(sink - high);
    top = high;
  }
  by *= a.v_scale / sum;
  const int64_t at = (token * a.q_heads + head) * a.head_dim;
  for (int64_t d = 0; d < a.head_dim; d += W) {
    vwrite(a.q_type, a.out, at + d, vmul(vload(acc + d), vset(by)), int(lesser(W, a.head_dim - d)));
  }
  if (a.lse != nullptr) a.lse[token * a.q_heads + head] = (top + __builtin_log2f(sum)) * LN2;
}

// All rows of a tile; row m of a kv head is query row m / group, head m % group of the group. top, sum and acc are
// `pitch` rows apart from one kv head to the next.
inline void write_tile(const RpaArgs& a, const RpaTile& t, const Sequence& s, int64_t pitch, int64_t padded, const float* top,
                       const float* sum, const float* acc) {
  const int64_t group = a.q_heads / a.kv_heads;
  for (int64_t h = 0; h < t.heads; ++h) {
    for (int64_t m = 0; m < t.rows * group; ++m) {
      const int64_t i = h * pitch + m;
      write_row(a, s.q_start + t.row0 + m / group, (t.head0 + h) * group + m % group, top[i], sum[i], acc + i * padded);
    }
  }
}

// The same numbers as a partial result: [maximum | sum | accumulators], rows without padding.
inline void save_tile(const RpaArgs& a, const RpaTile& t, int64_t pitch, int64_t padded, const float* top, const float* sum,
                      const float* acc, float* to) {
  const int64_t rows = t.rows * (a.q_heads / a.kv_heads), all = t.heads * rows;
  for (int64_t h = 0; h < t.heads; ++h) {
    std::memcpy(to + h * rows, top + h * pitch, rows * 4);
    std::memcpy(to + all + h * rows, sum + h * pitch, rows * 4);
    std::memcpy(to + 2 * all + h * rows * padded, acc + h * pitch * padded, rows * padded * 4);
  }
}

inline void merge_tile(const RpaArgs& a, const RpaTile& t, float* const* partials) {
  const int64_t padded = round_up(a.head_dim, W), all = int64_t(t.heads) * t.rows * (a.q_heads / a.kv_heads);
  float* first = partials[0];
  for (int64_t i = 0; i < all; ++i) {
    float top = LOWEST, sum = 0.0f;
    for (int p = 0; p < t.parts; ++p) top = partials[p][i] > top ? partials[p][i] : top;
    for (int p = 0; p < t.parts; ++p) {
      const float by = __builtin_exp2f(partials[p][i] - top);
      sum += by * partials[p][all + i];
      float* acc = first + 2 * all + i * padded;
      const float* add = partials[p] + 2 * all + i * padded;
      for (int64_t d = 0; d < padded; d += W) {
        const vf x = vmul(vload(add + d), vset(by));
        vstore(acc + d, p == 0 ? x : vadd(vload(acc + d), x));
      }
    }
    first[i] = top;
    first[all + i] = sum;
  }
  const Sequence s(a, t.seq);
  write_tile(a, t, s, all / t.heads, padded, first, first + all, first + 2 * all);
}

}  // namespace
