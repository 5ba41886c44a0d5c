// Sixteen floats at a time, for AVX-512 (F, BW, VL, DQ), with bf16 pair products where the file is compiled for them.
#pragma once
#include <immintrin.h>

#include "rpa.h"

namespace {

typedef __m512 vf;
constexpr int W = 16;
constexpr int NV = 4;  // vectors per row of a register tile
constexpr int MR = 6;  // rows of it

inline vf vset(float x) { return _mm512_set1_ps(x); }
inline vf vzero() { return _mm512_setzero_ps(); }
inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf vfnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf vround(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf vabs(vf a) { return _mm512_abs_ps(a); }
inline vf vless(vf a, vf b, vf yes, vf no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline float vhmax(vf a) { return _mm512_reduce_max_ps(a); }
inline float vhsum(vf a) { return _mm512_reduce_add_ps(a); }

// 2^n for whole n; n below -126 gives 0.
inline vf vpow2(vf n) {
  const __m512i i = _mm512_cvtps_epi32(_mm512_max_ps(n, vset(-127.0f)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(127)), 23));
}

// x where first <= lane <= last, else -inf.
inline vf vkeep(vf x, int first, int last) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 keep = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(first)) &
                         _mm512_cmple_epi32_mask(lane, _mm512_set1_epi32(last));
  return _mm512_mask_blend_ps(keep, vset(-__builtin_inff()), x);
}

inline vf from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// float8_e5m2 is the upper byte of a half; float8_e4m3fn shifted into a half is 2^-8 too small, and its NaN needs care.
inline __m256i e4m3_as_half(__m128i x) {
  const __m256i w = _mm256_cvtepu8_epi16(x);
  const __m256i low = _mm256_and_si256(w, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x80)), 8);
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(low, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7e00));
  return _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(low, 7), sign), nan);
}

template <int T>
inline vf vread(const void* base, int64_t i) {
  if (T == RPA_F32) return _mm512_loadu_ps(static_cast<const float*>(base) + i);
  if (T == RPA_BF16 || T == RPA_F16) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(base) + i));
    return T == RPA_BF16 ? from_bf16(x) : _mm512_cvtph_ps(x);
  }
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(base) + i));
  if (T == RPA_I8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
  if (T == RPA_E5M2) return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(x), 8));
  return vmul(_mm512_cvtph_ps(e4m3_as_half(x)), vset(256.0f));
}

inline __m256i to_bf16(vf x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i i = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(i, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i nan = _mm512_or_si512(i, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, up, nan), 16));
#endif
}

inline __m256i to_f16(vf x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// First `count` lanes to base[i...] in the output's type (a query type).
inline void vwrite(int type, void* base, int64_t i, vf x, int count) {
  const __mmask16 mask = count >= W ? 0xffff : __mmask16((1u << count) - 1);
  if (type == RPA_F32) {
    _mm512_mask_storeu_ps(static_cast<float*>(base) + i, mask, x);
  } else {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(base) + i, mask, type == RPA_BF16 ? to_bf16(x) : to_f16(x));
  }
}

// r[i][j] becomes r[j][i], as 32-bit words.
inline void vtranspose(vf* r) {
  vf t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {  // r[4k + j]: column j of each 4x4 of rows 4k..4k+3
    const vf a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const vf c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Lane i of the result is the sum of the lanes of r[i].
INLINE vf vsums(vf* r) {
  for (int i = 0; i < 8; ++i) {
    const vf a = r[2 * i], b = r[2 * i + 1];
    r[i] = vadd(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(r[2 * i]), b = _mm512_castps_pd(r[2 * i + 1]);
    r[i] = vadd(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    const vf a = r[2 * i], b = r[2 * i + 1];
    r[i] = vadd(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return vadd(_mm512_shuffle_f32x4(r[0], r[1], 0x88), _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
}

#ifdef __AVX512BF16__
#define RPA_PAIRS 1
// bf16 of 16 elements; every 8-bit type fits bf16 exactly.
template <int T>
inline __m256i read_bf16(const void* base, int64_t i) {
  if (T == RPA_BF16)
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(base) + i));
  return to_bf16(vread<T>(base, i));
}

// 32 consecutive elements as 16 pairs.
template <int T>
inline vf read_pairs(const void* base, int64_t i) {
  if (T == RPA_BF16) return _mm512_castsi512_ps(_mm512_loadu_si512(static_cast<const uint16_t*>(base) + i));
  const __m512i low = _mm512_castsi256_si512(read_bf16<T>(base, i));
  return _mm512_castsi512_ps(_mm512_inserti64x4(low, read_bf16<T>(base, i + 16), 1));
}

// Elements i.. of two rows, interleaved into 16 pairs.
template <int T>
inline vf zip_pairs(const void* even, const void* odd, int64_t i) {
  const __m512i low = _mm512_cvtepu16_epi32(read_bf16<T>(even, i));
  return _mm512_castsi512_ps(
      _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(read_bf16<T>(odd, i)), 16)));
}

// Elements i..i+31 of two rows as pairs, in the order that costs two instructions: columns 0-3, 8-11, 16-19, 24-27 in
// `low`, the others in `high`. put_in_order gives sums over such pairs their places.
template <int T>
inline void zip_wide(const void* even, const void* odd, int64_t i, vf& low, vf& high) {
  const __m512i a = _mm512_castps_si512(read_pairs<T>(even, i)), b = _mm512_castps_si512(read_pairs<T>(odd, i));
  low = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
  high = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
}

inline void put_in_order(float* columns) {
  const vf low = vload(columns), high = vload(columns + W);
  const vf first = _mm512_shuffle_f32x4(low, high, 0x44), second = _mm512_shuffle_f32x4(low, high, 0xee);
  vstore(columns, _mm512_shuffle_f32x4(first, first, 0xd8));
  vstore(columns + W, _mm512_shuffle_f32x4(second, second, 0xd8));
}

// Two vectors as 32 bf16.
inline void store_pairs(float* to, vf first, vf second) {
  vstore(to, _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second, first)));
}

inline vf vpairs(vf a, vf b, vf c) { return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b)); }
#endif

}  // namespace
