// Few query rows per kv head (decode): one pass over the cache for all heads, K and V used straight from memory as they
// stream by: in float32 whatever they are stored as, or as bf16 pairs where queries are bf16 and the processor multiplies
// those. Memory is the limit, so the loads are asked for one block ahead.
#pragma once
#include "rpa_common.h"

namespace {

constexpr int BN = 32;  // positions per block

// Head h's share of the next block, asked for a few lines at a time while h is computed: a burst would fill the queue of
// outstanding loads and hold everything up. In the order in which it lies in memory, which sets off the processor's own
// prefetcher, too. Into the second-level cache and every line: into the first it costs a third more time, and so does
// leaving every other line to the processor.
struct Ahead {
  const char* const* rows;
  int64_t row, first, last;    // rows first..last
  int64_t at, from, to, next;  // bytes from..to of each; then, unless next is negative, as many from `next` on
  // Four lines at a time, since counting single ones takes as long as asking for them.
  void fetch(int lines) {
    for (; lines > 0; lines -= 4) {
      if (row >= last) {
        if (next < 0) return;
        row = first, to += next - from, from = at = next, next = -1;
        if (row >= last) return;
      }
      const char* line = rows[row] + at;
      at += 256;
      if (at <= to) {
        prefetch(line), prefetch(line + 64), prefetch(line + 128), prefetch(line + 192);
      } else {
        for (int64_t left = to + 256 - at; left > 0; left -= 64, line += 64) prefetch(line);
      }
      if (at >= to) at = from, ++row;
    }
  }
};

template <int KT>
inline Ahead ahead_of(const RpaArgs& a, const RpaTile& t, const char* const* rows, int count, int64_t h) {
  constexpr int64_t item = size_of(KT);
  const int64_t head = a.kv_head * item;
  if (a.kv_position < a.kv_head) {
    const int64_t key = 2 * (t.head0 + h) * head;
    return {rows, 0, 0, count, key, key, key + a.head_dim * item, key + head};
  }
  const int64_t from = 2 * t.head0 * head, first = count * h / t.heads;
  return {rows, first, first, count * (h + 1) / t.heads, from, from, 2 * (t.head0 + t.heads) * head, -1};
}

// scores[g * BN + n] = <q row g, K row n> for GT query rows and `count` K rows.
template <int KT, int GT, bool PAIRS>
inline void stream_scores(const char* const* k, int count, const float* q, int64_t padded, float* scores,
                          Ahead& ahead) {
  constexpr int NS = W / GT;  // K rows at once, so that the sums fill one vector
  for (int n0 = 0; n0 < count; n0 += NS) {
    if (!PAIRS) ahead.fetch(4 * NS);
    const char* row[NS];
    #pragma GCC unroll 16
    for (int j = 0; j < NS; ++j) row[j] = k[n0 + j < count ? n0 + j : count - 1];
    vf r[W];
    #pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = vzero();
#ifdef RPA_PAIRS
    for (int64_t d = 0; PAIRS && d < padded; d += 2 * W) {
      vf x[NS];
      ahead.fetch(NS);
      #pragma GCC unroll 16
      for (int j = 0; j < NS; ++j) x[j] = read_pairs<KT>(row[j], d);
      #pragma GCC unroll 16
      for (int g = 0; g < GT; ++g) {
        const vf y = vload(q + g * padded + d / 2);
        #pragma GCC unroll 16
        for (int j = 0; j < NS; ++j) r[g * NS + j] = vpairs(x[j], y, r[g * NS + j]);
      }
    }
#endif
    for (int64_t d = 0; !PAIRS && d < padded; d += W) {
      vf x[NS];
      #pragma GCC unroll 16
      for (int j = 0; j < NS; ++j) x[j] = vread<KT>(row[j], d);
      #pragma GCC unroll 16
      for (int g = 0; g < GT; ++g) {
        const vf y = vload(q + g * padded + d);
        #pragma GCC unroll 16
        for (int j = 0; j < NS; ++j) r[g * NS + j] = vfma(x[j], y, r[g * NS + j]);
      }
    }
    alignas(64) float sums[W];
    vstore(sums, vsums(r));
    #pragma GCC unroll 16
    for (int g = 0; g < GT; ++g) std::memcpy(scores + g * BN + n0, sums + g * NS, NS * 4);
  }
}

// acc[g] = acc[g] * alpha[g] + sum_n weights[g * BN + n] * V row n, over DV vectors from element d on.
template <int KT, int GT, int DV>
inline void stream_values_at(const char* const* v, int count, const float* weights, const float* alpha, int64_t padded,
                             int64_t d, float* acc, Ahead& ahead) {
  vf r[GT][DV];
  #pragma GCC unroll 16
  for (int g = 0; g < GT; ++g) {
    #pragma GCC unroll 16
    for (int i = 0; i < DV; ++i) r[g][i] = vmul(vload(acc + g * padded + d + i * W), vset(alpha[g]));
  }
  for (int n = 0; n < count; ++n) {
    ahead.fetch(2);
    vf x[DV];
    #pragma GCC unroll 16
    for (int i = 0; i < DV; ++i) x[i] = vread<KT>(v[n], d + i * W);
    #pragma GCC unroll 16
    for (int g = 0; g < GT; ++g) {
      const vf w = vset(weights[g * BN + n]);
      #pragma GCC unroll 16
      for (int i = 0; i < DV; ++i) r[g][i] = vfma(w, x[i], r[g][i]);
    }
  }
  #pragma GCC unroll 16
  for (int g = 0; g < GT; ++g) {
    #pragma GCC unroll 16
    for (int i = 0; i < DV; ++i) vstore(acc + g * padded + d + i * W, r[g][i]);
  }
}

#ifdef RPA_PAIRS
// The same for 64 elements from d on, two V rows at a time; weights are bf16 pairs, acc is in zip_wide's order.
template <int KT, int GT>
inline void stream_value_pairs(const char* const* v, int count, const float* weights, const float* alpha, int64_t padded,
                               int64_t d, float* acc, Ahead& ahead) {
  vf r[GT][4];
  #pragma GCC unroll 16
  for (int g = 0; g < GT; ++g) {
    #pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) r[g][i] = vmul(vload(acc + g * padded + d + i * W), vset(alpha[g]));
  }
  for (int n = 0; n < count; n += 2) {
    const char* odd = v[n + 1 < count ? n + 1 : n];  // past the end the weight is zero
    ahead.fetch(4);
    vf x[4];
    zip_wide<KT>(v[n], odd, d, x[0], x[1]);
    zip_wide<KT>(v[n], odd, d + 2 * W, x[2], x[3]);
    #pragma GCC unroll 16
    for (int g = 0; g < GT; ++g) {
      const vf w = vset(weights[g * BN + n / 2]);
      #pragma GCC unroll 16
      for (int i = 0; i < 4; ++i) r[g][i] = vpairs(w, x[i], r[g][i]);
    }
  }
  #pragma GCC unroll 16
  for (int g = 0; g < GT; ++g) {
    #pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) vstore(acc + g * padded + d + i * W, r[g][i]);
  }
}
#endif

template <int KT, int GT>
inline void stream_values(const char* const* v, int count, const float* weights, const float* alpha, int64_t padded,
                          float* acc, Ahead& ahead) {
  int64_t d = 0;
  for (; d + NV * W <= padded; d += NV * W) stream_values_at<KT, GT, NV>(v, count, weights, alpha, padded, d, acc, ahead);
  for (; d < padded; d += W) stream_values_at<KT, GT, 1>(v, count, weights, alpha, padded, d, acc, ahead);
}

// One query row's block: scores become weights in place, top and sum move on; returns what earlier sums are worth now.
INLINE float stream_softmax(float* scores, int count, const Logit& logit, int first, int last, float* top, float* sum) {
  constexpr int vectors = BN / W;
  const int used = (count + W - 1) / W;
  vf x[vectors];
  vf high = vset(*top);
  for (int j = 0; j < used; ++j) {
    x[j] = vlogit(vload(scores + j * W), vset(logit.by), logit.capped, vset(logit.cap));
    if (first > 0 || last < used * W - 1) x[j] = vkeep(x[j], first - j * W, last - j * W);
    high = vmax(high, x[j]);
  }
  const float now = vhmax(high);
  // Not exp2f: a call would write every vector register to memory.
  alignas(64) float alpha[W];
  vstore(alpha, vexp2(vset(*top - now)));
  vf total = vzero();
  for (int j = 0; j < used; ++j) {
    x[j] = vexp2(vsub(x[j], vset(now)));
    total = vadd(total, x[j]);
    vstore(scores + j * W, x[j]);
  }
  *top = now;
  *sum = *sum * alpha[0] + vhsum(total);
  return alpha[0];
}

struct StreamTile {
  int64_t group, rows, tiles, lanes, padded;  // rows: of one kv head; padded to tiles * lanes
  float *q, *acc, *top, *sum;
};

template <int KT, int GT, bool PAIRS>
inline void stream_block(const RpaArgs& a, const RpaTile& t, const Sequence& s, const StreamTile& st, const Logit& logit,
                         int64_t position, int count, const char* const* k, const char* const* v, int64_t h, float* scores,
                         Ahead& ahead) {
  const int64_t base = h * st.tiles * st.lanes;
  for (int64_t tile = 0; tile < st.tiles; ++tile) {
    const int64_t m0 = base + tile * GT;
    alignas(64) float alpha[GT];
    stream_scores<KT, GT, PAIRS>(k, count, st.q + m0 * st.padded, st.padded, scores, ahead);
    for (int g = 0; g < GT; ++g) {
      const int64_t row = (tile * GT + g) / st.group;
      if (tile * GT + g >= st.rows) {
        std::memset(scores + g * BN, 0, BN * 4);
        alpha[g] = 1.0f;
        continue;
      }
      const int64_t newest = s.kv_len - s.q_len + t.row0 + row - position;
      const int64_t oldest = a.window > 0 ? newest - a.window + 1 : 0;
      alpha[g] = stream_softmax(scores + g * BN, count, logit, int(greater(oldest, 0)), int(lesser(newest, count - 1)),
                                st.top + m0 + g, st.sum + m0 + g);
    }
    float* acc = st.acc + m0 * st.padded;
#ifdef RPA_PAIRS
    if (PAIRS) {
      for (int g = 0; g < GT; ++g) {
        float* row = scores + g * BN;
        store_pairs(row, vload(row), count > W ? vload(row + W) : vzero());
      }
      for (int64_t d = 0; d < st.padded; d += 4 * W) {
        stream_value_pairs<KT, GT>(v, count, scores, alpha, st.padded, d, acc, ahead);
      }
      continue;
    }
#endif
    stream_values<KT, GT>(v, count, scores, alpha, st.padded, acc, ahead);
  }
}

template <int KT>
inline void prefetch_rows(const RpaArgs& a, const char* const* rows, int count, int64_t head) {
  const int64_t bytes = a.head_dim * size_of(KT), at = 2 * head * a.kv_head * size_of(KT);
  const int64_t value = a.kv_head * size_of(KT);
  for (int n = 0; n < count; ++n) {
    for (int64_t b = 0; b < bytes; b += 64) prefetch(rows[n] + at + b);
  }
  for (int n = 0; n < count; ++n) {
    for (int64_t b = 0; b < bytes; b += 64) prefetch(rows[n] + at + value + b);
  }
}

// Rows whose length is no multiple of a vector: copied to float32, zero-padded.
template <int KT>
inline void widen_rows(const RpaArgs& a, const char* const* rows, int count, int64_t padded, float* to, const char** now) {
  for (int n = 0; n < count; ++n) {
    read_query_as<KT>(rows[n], a.head_dim, padded, to + n * padded);
    now[n] = reinterpret_cast<const char*>(to + n * padded);
  }
}

inline int64_t rows_of(const RpaArgs& a, const RpaTile& t) { return t.rows * (a.q_heads / a.kv_heads); }

// Addresses of the first block of what this thread does next, if that streams, too: nothing else would ask for them ahead.
inline int first_rows(const RpaArgs& a, const RpaWork& then, int64_t item, const char** to) {
  if (then.unit == nullptr || rows_of(a, *then.tile) > RPA_STREAM_ROWS) return 0;
  const int count = int(lesser(BN, then.unit->kv1 - then.unit->kv0));
  row_addresses(a, Sequence(a, then.tile->seq), then.unit->kv0, count, item, to);
  return count;
}

// Head h's share of one line of every 4 KB of the pages that hold positions from..to: by the time they are asked for in
// full, the processor knows where they are. It takes as long to look that up in memory as to read them, and prefetches
// wait for it. Measured: 25 MB in random pages of 64 KB are read in 570 us this way, and in 750 us without.
inline void touch_pages(const RpaArgs& a, int seq, int64_t from, int64_t to, int64_t item, int64_t h, int64_t heads) {
  const Sequence s(a, seq);
  const int64_t bytes = greater(a.page_size * a.kv_position, 2 * a.kv_heads * a.kv_head) * item;
  for (int64_t page = from / a.page_size; from < to && page * a.page_size < to; ++page) {
    const char* at = static_cast<const char*>(a.kv) + s.pages[page] * a.kv_page * item;
    for (int64_t b = h * 4096; b < bytes; b += heads * 4096) prefetch(at + b);
  }
}

// The same for the block that is computed `blocks` after the one at `position`, in this unit or in the thread's next.
inline void touch_ahead(const RpaArgs& a, const RpaTile& t, const RpaUnit& u, const RpaWork& then, int64_t position,
                        int64_t blocks, int64_t item, int64_t h, int64_t heads) {
  int64_t from = position + blocks * BN;
  if (from < u.kv1) {
    touch_pages(a, t.seq, from, lesser(from + BN, u.kv1), item, h, heads);
  } else if (then.unit != nullptr && rows_of(a, *then.tile) <= RPA_STREAM_ROWS) {
    from = then.unit->kv0 + (blocks - (u.kv1 - position + BN - 1) / BN) * BN;
    touch_pages(a, then.tile->seq, from, lesser(from + BN, then.unit->kv1), item, h, heads);
  }
}

template <int KT, int GT, bool PAIRS>
void stream_unit(const RpaArgs& a, const RpaTile& t, const RpaUnit& u, float* partial, const RpaWork& then) {
  static thread_local Scratch scratch;
  const Sequence s(a, t.seq);
  const Logit logit(a);
  StreamTile st;
  st.group = a.q_heads / a.kv_heads;
  st.rows = t.rows * st.group;
  st.lanes = GT;
  st.tiles = (st.rows + GT - 1) / GT;
  st.padded = round_up(a.head_dim, W);
  const int64_t pitch = st.tiles * GT, all = t.heads * pitch;
  scratch.reserve(2 * Scratch::bytes(all * st.padded) + 2 * Scratch::bytes(all) + 2 * Scratch::bytes(BN * st.padded));
  st.q = scratch.take<float>(all * st.padded);
  st.acc = scratch.take<float>(all * st.padded);
  st.top = scratch.take<float>(all);
  st.sum = scratch.take<float>(all);
  float* wide_k = scratch.take<float>(BN * st.padded);
  float* wide_v = scratch.take<float>(BN * st.padded);
  std::memset(st.q, 0, all * st.padded * 4);
  std::memset(st.acc, 0, all * st.padded * 4);
  for (int64_t i = 0; i < all; ++i) st.top[i] = LOWEST, st.sum[i] = 0.0f;
  for (int64_t h = 0; h < t.heads; ++h) {
    for (int64_t m = 0; m < st.rows; ++m) {
      const int64_t token = s.q_start + t.row0 + m / st.group, head = (t.head0 + h) * st.group + m % st.group;
      float* to = st.q + (h * pitch + m) * st.padded;
      if (PAIRS) {
        std::memcpy(to, static_cast<const uint16_t*>(a.q) + token * a.q_token + head * a.q_head, a.head_dim * 2);
      } else {
        read_query(a, token, head, st.padded, to);
      }
    }
  }
  const bool whole = a.head_dim % W == 0;
  constexpr int64_t item = size_of(KT);
  alignas(64) float scores[GT * BN];
  const char *rows[BN], *next[BN], *k[BN], *v[BN];
  int count = int(lesser(BN, u.kv1 - u.kv0));
  row_addresses(a, s, u.kv0, count, item, next);
  for (int64_t blocks = 0; blocks < 2; ++blocks) touch_ahead(a, t, u, then, u.kv0, blocks, item, 0, 1);
  for (int64_t position = u.kv0; position < u.kv1; position += BN) {
    count = int(lesser(BN, u.kv1 - position));
    std::memcpy(rows, next, sizeof(rows));
    int ahead = int(greater(0, lesser(BN, u.kv1 - position - BN)));
    if (ahead > 0) row_addresses(a, s, position + BN, ahead, item, next);
    if (ahead == 0) ahead = first_rows(a, then, item, next);
    for (int64_t h = 0; h < t.heads; ++h) {
      touch_ahead(a, t, u, then, position, 2, item, h, t.heads);
      // Once more for the head that is next: the processor drops some of what `Ahead` asks for while its queue is full, and
      // asking for what has come costs little. 6% of a decode step.
      if (h + 1 < t.heads) {
        prefetch_rows<KT>(a, rows, count, t.head0 + h + 1);
      } else {
        prefetch_rows<KT>(a, next, ahead, t.head0);
      }
      for (int n = 0; n < count; ++n) {
        k[n] = rows[n] + 2 * (t.head0 + h) * a.kv_head * item;
        v[n] = k[n] + a.kv_head * item;
      }
      Ahead soon = ahead_of<KT>(a, t, next, ahead, h);
      if (PAIRS || whole) {
        stream_block<KT, GT, PAIRS>(a, t, s, st, logit, position, count, k, v, h, scores, soon);
      } else {
        widen_rows<KT>(a, k, count, st.padded, wide_k, k);
        widen_rows<KT>(a, v, count, st.padded, wide_v, v);
        stream_block<RPA_F32, GT, false>(a, t, s, st, logit, position, count, k, v, h, scores, soon);
      }
      soon.fetch(1 << 20);  // what the loops did not get to
    }
  }
#ifdef RPA_PAIRS
  for (int64_t i = 0; PAIRS && i < all * st.padded; i += 2 * W) put_in_order(st.acc + i);
#endif
  if (partial == nullptr) {
    write_tile(a, t, s, pitch, st.padded, st.top, st.sum, st.acc);
  } else {
    save_tile(a, t, pitch, st.padded, st.top, st.sum, st.acc, partial);
  }
}

}  // namespace
