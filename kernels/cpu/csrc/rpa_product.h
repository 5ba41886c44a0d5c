// Many query rows per kv head (prefill): blocks of K and V are packed once and multiplied with all rows of the tile, softmax
// online in between. bf16 queries over bf16 or 8-bit caches multiply as bf16 pairs where the processor can; everything
// else in float32.
#pragma once
#include "rpa_common.h"
#include "rpa_stream.h"

namespace {

constexpr int NB = 64;  // positions per block: a packed K or V block of head_dim 128 fits the first-level cache

struct OpFloat {
  typedef float Word;
  static constexpr int per = 1;  // elements of a dot product in one word
  static vf multiply(vf acc, const float* x, vf y) { return vfma(vset(*x), y, acc); }
  template <int KT>
  static vf along(const void* row, int64_t d) { return vread<KT>(row, d); }
  template <int KT>
  static vf across(const void* even, const void*, int64_t d) { return vread<KT>(even, d); }
  static void query(const RpaArgs& a, int64_t token, int64_t head, int64_t words, float* to, float*) {
    read_query(a, token, head, words, to);
  }
  // Weights of one row, already in float32 where they are needed.
  static void weights(const vf*, int, float*) {}
};

#ifdef RPA_PAIRS
struct OpPairs {
  typedef uint32_t Word;
  static constexpr int per = 2;
  static vf multiply(vf acc, const uint32_t* x, vf y) {
    return vpairs(_mm512_castsi512_ps(_mm512_set1_epi32(int(*x))), y, acc);
  }
  template <int KT>
  static vf along(const void* row, int64_t d) { return read_pairs<KT>(row, d); }
  template <int KT>
  static vf across(const void* even, const void* odd, int64_t d) { return zip_pairs<KT>(even, odd, d); }
  static void query(const RpaArgs& a, int64_t token, int64_t head, int64_t, uint32_t* to, float*) {
    const uint16_t* row = static_cast<const uint16_t*>(a.q) + token * a.q_token + head * a.q_head;
    std::memcpy(to, row, a.head_dim * 2);  // the rest of `to` was zeroed
  }
  static void weights(const vf* x, int vectors, uint32_t* to) {
    for (int j = 0; j < vectors; j += 2) {
      const vf high = j + 1 < vectors ? x[j + 1] : vzero();
      _mm512_storeu_si512(to + j * 8, (__m512i)_mm512_cvtne2ps_pbh(high, x[j]));
    }
  }
};
#endif

// c (+)= a b for MR rows and NN vectors of columns; with alpha, row m of c is first multiplied by alpha[m].
template <class Op, int NN>
inline void product_tile(const typename Op::Word* x, int64_t ldx, const float* y, int64_t ldy, int64_t depth, float* c,
                         int64_t ldc, const float* alpha) {
  vf r[MR][NN];
  #pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    #pragma GCC unroll 16
    for (int i = 0; i < NN; ++i) {
      r[m][i] = alpha == nullptr ? vzero() : vmul(vload(c + m * ldc + i * W), vset(alpha[m]));
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    vf b[NN];
    #pragma GCC unroll 16
    for (int i = 0; i < NN; ++i) b[i] = vload(y + k * ldy + i * W);
    #pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      #pragma GCC unroll 16
      for (int i = 0; i < NN; ++i) r[m][i] = Op::multiply(r[m][i], x + m * ldx + k, b[i]);
    }
  }
  #pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    #pragma GCC unroll 16
    for (int i = 0; i < NN; ++i) vstore(c + m * ldc + i * W, r[m][i]);
  }
}

// rows is a multiple of MR, columns of W.
template <class Op>
inline void product(int64_t rows, int64_t columns, int64_t depth, const typename Op::Word* x, int64_t ldx, const float* y,
                    int64_t ldy, float* c, int64_t ldc, const float* alpha) {
  int64_t i = 0;
  for (; i + NV * W <= columns; i += NV * W) {
    for (int64_t m = 0; m < rows; m += MR) {
      product_tile<Op, NV>(x + m * ldx, ldx, y + i, ldy, depth, c + m * ldc + i, ldc, alpha ? alpha + m : nullptr);
    }
  }
  for (; i < columns; i += W) {
    for (int64_t m = 0; m < rows; m += MR) {
      product_tile<Op, 1>(x + m * ldx, ldx, y + i, ldy, depth, c + m * ldc + i, ldc, alpha ? alpha + m : nullptr);
    }
  }
}

// K block as [words of head_dim][NB positions]; positions past count are zero.
template <class Op, int KT>
inline void pack_keys(const char* const* rows, int count, int64_t words, float* to) {
  for (int n0 = 0; n0 < round_up(count, W); n0 += W) {
    for (int64_t d = 0; d < words; d += W) {
      vf r[W];
      #pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        r[i] = n0 + i < count ? Op::template along<KT>(rows[n0 + i], d * Op::per) : vzero();
      }
      vtranspose(r);
      #pragma GCC unroll 16
      for (int i = 0; i < W; ++i) vstore(to + (d + i) * NB + n0, r[i]);
    }
  }
}

// V block as [positions / Op::per][padded head_dim].
template <class Op, int KT>
inline void pack_values(const char* const* rows, int count, int64_t padded, const char* zeros, float* to) {
  for (int n = 0; n < count; n += Op::per) {
    const char* odd = n + 1 < count ? rows[n + 1] : zeros;
    for (int64_t d = 0; d < padded; d += W) vstore(to + n / Op::per * padded + d, Op::template across<KT>(rows[n], odd, d));
  }
}

struct ProductTile {
  int64_t group, rows, padded_rows, words, padded;
  float *scores, *acc, *top, *sums, *alpha;
};

// Scores of all rows become weights; `sums` keeps one partial sum per lane, so that no row is added up across lanes.
template <class Op>
inline void product_softmax(const RpaArgs& a, const RpaTile& t, const Sequence& s, const ProductTile& p, const Logit& logit,
                            int64_t position, int count, typename Op::Word* weights) {
  constexpr int most = NB / W;
  const int used = (count + W - 1) / W;
  for (int64_t m = 0; m < p.rows; ++m) {
    const int64_t newest = s.kv_len - s.q_len + t.row0 + m / p.group - position;
    const int last = int(greater(-1, lesser(newest, count - 1)));
    const int first = a.window > 0 ? int(greater(0, lesser(newest - a.window + 1, NB))) : 0;
    float* row = p.scores + m * NB;
    vf x[most];
    for (int j = 0; j < used; ++j) x[j] = vlogit(vload(row + j * W), vset(logit.by), logit.capped, vset(logit.cap));
    if (first > 0 || last < used * W - 1) {
      for (int j = 0; j < used; ++j) x[j] = vkeep(x[j], first - j * W, last - j * W);
    }
    vf high = vset(p.top[m]);
    for (int j = 0; j < used; ++j) high = vmax(high, x[j]);
    const float now = vhmax(high);
    const vf alpha = vexp2(vset(p.top[m] - now));
    vf sum = vmul(vload(p.sums + m * W), alpha);
    for (int j = 0; j < used; ++j) {
      x[j] = vexp2(vsub(x[j], vset(now)));
      sum = vadd(sum, x[j]);
      if (Op::per == 1) vstore(row + j * W, x[j]);
    }
    Op::weights(x, used, weights + m * (NB / Op::per));
    vstore(p.sums + m * W, sum);
    alignas(64) float lanes[W];
    vstore(lanes, alpha);
    p.alpha[m] = lanes[0];
    p.top[m] = now;
  }
}

template <class Op, int KT>
void product_unit(const RpaArgs& a, const RpaTile& t, const RpaUnit& u, float* partial) {
  typedef typename Op::Word Word;
  static thread_local Scratch scratch;
  const Sequence s(a, t.seq);
  const Logit logit(a);
  ProductTile p;
  p.group = a.q_heads / a.kv_heads;
  p.rows = t.rows * p.group;
  p.padded_rows = round_up(p.rows, MR);
  p.padded = round_up(a.head_dim, W);
  p.words = round_up(a.head_dim, W * Op::per) / Op::per;
  const int64_t depth = (a.head_dim + Op::per - 1) / Op::per;
  constexpr int64_t item = size_of(KT);
  // Rows that end inside a vector are copied here first: [NB + 1 rows], the last one zero.
  const int64_t copy = round_up(p.padded * item, 64) + 64;
  scratch.reserve(Scratch::bytes(p.padded_rows * p.words) + Scratch::bytes(p.words * NB) + Scratch::bytes(NB * p.padded) +
                  2 * Scratch::bytes(p.padded_rows * NB) + Scratch::bytes(p.padded_rows * p.padded) +
                  3 * Scratch::bytes(p.padded_rows * W) + Scratch::bytes((NB + 1) * copy));
  Word* query = scratch.take<Word>(p.padded_rows * p.words);
  float* keys = scratch.take<float>(p.words * NB);
  float* values = scratch.take<float>(NB * p.padded);
  p.scores = scratch.take<float>(p.padded_rows * NB);
  Word* weights = Op::per == 1 ? reinterpret_cast<Word*>(p.scores) : scratch.take<Word>(p.padded_rows * NB);
  p.acc = scratch.take<float>(p.padded_rows * p.padded);
  p.top = scratch.take<float>(p.padded_rows);
  p.alpha = scratch.take<float>(p.padded_rows);
  p.sums = scratch.take<float>(p.padded_rows * W);
  char* copies = scratch.take<char>((NB + 1) * copy);
  std::memset(query, 0, p.padded_rows * p.words * 4);
  std::memset(p.acc, 0, p.padded_rows * p.padded * 4);
  std::memset(p.sums, 0, p.padded_rows * W * 4);
  std::memset(weights, 0, p.padded_rows * NB * 4);
  std::memset(copies, 0, (NB + 1) * copy);
  for (int64_t m = 0; m < p.padded_rows; ++m) p.top[m] = LOWEST, p.alpha[m] = 1.0f;
  for (int64_t m = 0; m < p.rows; ++m) {
    Op::query(a, s.q_start + t.row0 + m / p.group, t.head0 * p.group + m % p.group, p.words, query + m * p.words, nullptr);
  }
  const bool whole = a.head_dim % (W * Op::per) == 0;
  const char *rows[NB], *next[NB], *k[NB], *v[NB];
  int count = int(lesser(NB, u.kv1 - u.kv0));
  row_addresses(a, s, u.kv0, count, item, next);
  for (int64_t position = u.kv0; position < u.kv1; position += NB) {
    count = int(lesser(NB, u.kv1 - position));
    std::memcpy(rows, next, sizeof(rows));
    const int ahead = int(greater(0, lesser(NB, u.kv1 - position - NB)));
    if (ahead > 0) row_addresses(a, s, position + NB, ahead, item, next);
    prefetch_rows<KT>(a, next, ahead, t.head0);
    for (int n = 0; n < count; ++n) {
      k[n] = rows[n] + 2 * t.head0 * a.kv_head * item;
      v[n] = k[n] + a.kv_head * item;
    }
    for (int n = 0; n < (whole ? 0 : count); ++n) {
      std::memcpy(copies + n * copy, k[n], a.head_dim * item);
      k[n] = copies + n * copy;
    }
    pack_keys<Op, KT>(k, count, p.words, keys);
    for (int n = 0; n < (whole ? 0 : count); ++n) {
      std::memcpy(copies + n * copy, v[n], a.head_dim * item);
      v[n] = copies + n * copy;
    }
    pack_values<Op, KT>(v, count, p.padded, copies + NB * copy, values);
    product<Op>(p.padded_rows, round_up(count, W), depth, query, p.words, keys, NB, p.scores, NB, nullptr);
    product_softmax<Op>(a, t, s, p, logit, position, count, weights);
    product<Op>(p.padded_rows, p.padded, (count + Op::per - 1) / Op::per, weights, NB / Op::per, values, p.padded, p.acc,
                p.padded, p.alpha);
  }
  for (int64_t m = 0; m < p.rows; ++m) p.sums[m] = vhsum(vload(p.sums + m * W));
  if (partial == nullptr) {
    write_tile(a, t, s, p.padded_rows, p.padded, p.top, p.sums, p.acc);
  } else {
    save_tile(a, t, p.padded_rows, p.padded, p.top, p.sums, p.acc, partial);
  }
}

template <int KT, bool PAIRS>
void run_stream(const RpaArgs& a, const RpaTile& t, const RpaUnit& u, float* partial, const RpaWork& then) {
  const int64_t rows = rows_of(a, t);
  if (rows == 1) return stream_unit<KT, 1, PAIRS>(a, t, u, partial, then);
  if (rows == 2) return stream_unit<KT, 2, PAIRS>(a, t, u, partial, then);
  return stream_unit<KT, 4, PAIRS>(a, t, u, partial, then);
}

template <int KT>
void run_type(const RpaArgs& a, const RpaTile& t, const RpaUnit& u, float* partial, const RpaWork& then) {
  const int64_t rows = rows_of(a, t);
#ifdef RPA_PAIRS
  if constexpr (KT != RPA_F32 && KT != RPA_F16) {
    if (a.q_type == RPA_BF16) {
      if (rows > RPA_STREAM_ROWS) return product_unit<OpPairs, KT>(a, t, u, partial);
      if (a.head_dim % (4 * W) == 0) return run_stream<KT, true>(a, t, u, partial, then);
    }
  }
#endif
  if (rows <= RPA_STREAM_ROWS) return run_stream<KT, false>(a, t, u, partial, then);
  product_unit<OpFloat, KT>(a, t, u, partial);
}

void run_unit(const RpaArgs& a, const RpaTile& t, const RpaUnit& u, float* partial, const RpaWork& then) {
  switch (a.kv_type) {
    case RPA_F32: return run_type<RPA_F32>(a, t, u, partial, then);
    case RPA_BF16: return run_type<RPA_BF16>(a, t, u, partial, then);
    case RPA_F16: return run_type<RPA_F16>(a, t, u, partial, then);
    case RPA_E4M3: return run_type<RPA_E4M3>(a, t, u, partial, then);
    case RPA_E5M2: return run_type<RPA_E5M2>(a, t, u, partial, then);
    default: return run_type<RPA_I8>(a, t, u, partial, then);
  }
}

}  // namespace
