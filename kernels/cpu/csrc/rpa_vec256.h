// Eight floats at a time, for AVX2 with FMA and F16C. The same names as rpa_vec512.h.
#pragma once
#include <immintrin.h>

#include "rpa.h"

namespace {

typedef __m256 vf;
constexpr int W = 8;
constexpr int NV = 2;  // vectors per row of a register tile
constexpr int MR = 5;  // rows of it

inline vf vset(float x) { return _mm256_set1_ps(x); }
inline vf vzero() { return _mm256_setzero_ps(); }
inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf vfnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf vround(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf vabs(vf a) { return _mm256_andnot_ps(vset(-0.0f), a); }
inline vf vless(vf a, vf b, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }

inline float vhmax(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline float vhsum(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

// 2^n for whole n; n below -126 gives 0.
inline vf vpow2(vf n) {
  const __m256i i = _mm256_cvtps_epi32(_mm256_max_ps(n, vset(-127.0f)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23));
}

inline __m256i lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

// x where first <= lane <= last, else -inf.
inline vf vkeep(vf x, int first, int last) {
  const __m256i drop = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lanes()),
                                       _mm256_cmpgt_epi32(lanes(), _mm256_set1_epi32(last)));
  return _mm256_blendv_ps(x, vset(-__builtin_inff()), _mm256_castsi256_ps(drop));
}

// float8_e5m2 is the upper byte of a half; float8_e4m3fn shifted into a half is 2^-8 too small, and its NaN needs care.
inline __m128i e4m3_as_half(__m128i x) {
  const __m128i w = _mm_cvtepu8_epi16(x);
  const __m128i low = _mm_and_si128(w, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(w, _mm_set1_epi16(0x80)), 8);
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(low, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
  return _mm_or_si128(_mm_or_si128(_mm_slli_epi16(low, 7), sign), nan);
}

template <int T>
inline vf vread(const void* base, int64_t i) {
  if (T == RPA_F32) return _mm256_loadu_ps(static_cast<const float*>(base) + i);
  if (T == RPA_BF16 || T == RPA_F16) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(base) + i));
    if (T == RPA_F16) return _mm256_cvtph_ps(x);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(base) + i));
  if (T == RPA_I8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
  if (T == RPA_E5M2) return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(x), 8));
  return vmul(_mm256_cvtph_ps(e4m3_as_half(x)), vset(256.0f));
}

inline __m128i to_bf16(vf x) {
  const __m256i i = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_or_si256(i, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, nan, is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

// First `count` lanes to base[i...] in the output's type (a query type).
inline void vwrite(int type, void* base, int64_t i, vf x, int count) {
  if (type == RPA_F32) {
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes());
    _mm256_maskstore_ps(static_cast<float*>(base) + i, mask, x);
    return;
  }
  const __m128i half =
      type == RPA_BF16 ? to_bf16(x) : _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  uint16_t words[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), half);
  uint16_t* to = static_cast<uint16_t*>(base) + i;
  for (int j = 0; j < (count < W ? count : W); ++j) to[j] = words[j];
}

// r[i][j] becomes r[j][i].
inline void vtranspose(vf* r) {
  vf t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Lane i of the result is the sum of the lanes of r[i].
INLINE vf vsums(vf* r) {
  const vf a = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  const vf b = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
  return vadd(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

}  // namespace
