// Writing rows of K or V into the cache: a copy where the types agree, else rounded once to nearest even after division by
// the scale, and held inside the range of an 8-bit type. Bit for bit what torch's casts give.
#pragma once
#include <cmath>
#include <cstring>

#include "rpa.h"

struct RpaWriteArgs {
  const void* k;  // [tokens, kv_heads, head_dim]
  const void* v;
  void* kv;
  const int64_t* slots;  // [tokens], -1: skip
  int64_t k_token, k_head, v_token, v_head;
  int64_t kv_page, kv_position, kv_head;
  int64_t tokens, page_size, num_slots;
  int32_t kv_heads, head_dim, new_type, kv_type, threads;
  int32_t k_scaled, v_scaled;
  float k_scale, v_scale;
};

namespace {

inline uint32_t bits_of(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}

inline float float_of(uint32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return float_of(sign | bits_of(float(mantissa) * 5.9604644775390625e-8f));  // 2^-24
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t float_to_bf16(float x) {
  const uint32_t b = bits_of(x);
  if (x != x) return 0x7fc0;
  return uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

// A binary float with EXPONENT and MANTISSA bits, to nearest even; finite results only need no range check before.
template <int EXPONENT, int MANTISSA>
inline uint32_t float_to_small(float x) {
  const uint32_t b = bits_of(x), sign = b >> 31 << (EXPONENT + MANTISSA);
  const float a = float_of(b & 0x7fffffff);
  const int bias = (1 << (EXPONENT - 1)) - 1;
  const float least = std::ldexp(1.0f, 1 - bias);  // smallest normal number
  if (a < least) {
    // Subnormal: the addition rounds to a multiple of the smallest number, and the low bits are the result.
    const float step = std::ldexp(1.0f, 1 - bias - MANTISSA + 23);
    return sign | (bits_of(a + step) - bits_of(step));
  }
  const uint32_t whole = b & 0x7fffffff, drop = 23 - MANTISSA;
  const uint32_t rounded = whole + (1u << (drop - 1)) - 1 + ((whole >> drop) & 1);
  return sign | ((rounded >> drop) - (uint32_t(127 - bias) << MANTISSA));
}

inline uint16_t float_to_half(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  if (x != x) return uint16_t(sign | 0x7e00);
  if (std::fabs(x) >= 65520.0f) return uint16_t(sign | 0x7c00);
  return uint16_t(float_to_small<5, 10>(x));
}

inline float held(float x, float most) { return x > most ? most : x < -most ? -most : x; }  // NaN stays

template <int FROM>
inline float widen(const void* row, int64_t d) {
  if (FROM == RPA_F32) return static_cast<const float*>(row)[d];
  const uint16_t h = static_cast<const uint16_t*>(row)[d];
  return FROM == RPA_BF16 ? float_of(uint32_t(h) << 16) : half_to_float(h);
}

template <int TO>
inline void narrow(void* row, int64_t d, float x) {
  if (TO == RPA_F32) static_cast<float*>(row)[d] = x;
  if (TO == RPA_BF16) static_cast<uint16_t*>(row)[d] = float_to_bf16(x);
  if (TO == RPA_F16) static_cast<uint16_t*>(row)[d] = float_to_half(x);
  if (TO == RPA_E4M3) static_cast<uint8_t*>(row)[d] = x != x ? 0x7f : uint8_t(float_to_small<4, 3>(held(x, 448.0f)));
  if (TO == RPA_E5M2) static_cast<uint8_t*>(row)[d] = x != x ? 0x7f : uint8_t(float_to_small<5, 2>(held(x, 57344.0f)));
  if (TO == RPA_I8) static_cast<int8_t*>(row)[d] = int8_t(std::nearbyint(x > 127.0f ? 127.0f : x < -128.0f ? -128.0f : x));
}

template <int FROM, int TO>
void write_row_as(const void* from, void* to, int64_t dim, bool scaled, float scale) {
  if (FROM == TO && !scaled) {
    std::memcpy(to, from, dim * (FROM == RPA_F32 ? 4 : 2));
    return;
  }
  const float by = scaled ? scale : 1.0f;
  for (int64_t d = 0; d < dim; ++d) narrow<TO>(to, d, widen<FROM>(from, d) / by);
}

typedef void (*WriteRow)(const void*, void*, int64_t, bool, float);

template <int FROM>
WriteRow writer_from(int32_t to) {
  switch (to) {
    case RPA_F32: return write_row_as<FROM, RPA_F32>;
    case RPA_BF16: return write_row_as<FROM, RPA_BF16>;
    case RPA_F16: return write_row_as<FROM, RPA_F16>;
    case RPA_E4M3: return write_row_as<FROM, RPA_E4M3>;
    case RPA_E5M2: return write_row_as<FROM, RPA_E5M2>;
    default: return write_row_as<FROM, RPA_I8>;
  }
}

inline WriteRow writer(int32_t from, int32_t to) {
  if (from == RPA_F32) return writer_from<RPA_F32>(to);
  return from == RPA_BF16 ? writer_from<RPA_BF16>(to) : writer_from<RPA_F16>(to);
}

inline int64_t item_size(int32_t type) { return type == RPA_F32 ? 4 : type <= RPA_F16 ? 2 : 1; }

// K and V of one token, all heads, into one slot.
inline void write_token(const RpaWriteArgs& a, WriteRow write, int64_t token, int64_t slot) {
  const int64_t page = slot / a.page_size, offset = slot - page * a.page_size;
  const int64_t in = item_size(a.new_type), out = item_size(a.kv_type);
  char* at = static_cast<char*>(a.kv) + (page * a.kv_page + offset * a.kv_position) * out;
  const char* k = static_cast<const char*>(a.k) + token * a.k_token * in;
  const char* v = static_cast<const char*>(a.v) + token * a.v_token * in;
  for (int64_t h = 0; h < a.kv_heads; ++h) {
    write(k + h * a.k_head * in, at + 2 * h * a.kv_head * out, a.head_dim, a.k_scaled != 0, a.k_scale);
    write(v + h * a.v_head * in, at + (2 * h + 1) * a.kv_head * out, a.head_dim, a.v_scaled != 0, a.v_scale);
  }
}

}  // namespace
