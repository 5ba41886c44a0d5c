// Vectors of VL floats for one instruction set, and the few things that vector extensions of the compiler cannot say.
// Included by gdn_impl.h inside a namespace of its own per instruction set; the caller sets none of the macros below.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VL 16
#define HAVE_BF16_DOT 1
#elif defined(__AVX2__)
#define VL 8
#define HAVE_BF16_DOT 0
#else
#define VL 4
#define HAVE_BF16_DOT 0
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

struct BF16 { uint16_t bits; };
struct FP16 { uint16_t bits; };

template <class To, class From> static inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}
static inline vf splat(float x) { return x - vf{}; }
static inline vf load(const float* p) { vf v; __builtin_memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
static inline vf select(vi mask, vf yes, vf no) { return bits_as<vf>((mask & bits_as<vi>(yes)) | (~mask & bits_as<vi>(no))); }

static inline float one(float x) { return x; }
static inline float one(BF16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
static inline float one(FP16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    // Subnormal numbers are multiples of 2^-24; shifted like the others they would be subnormal floats, which count as zero
    // here (see run()). 2^112 rebiases the exponent of the others.
    const float y = rest < 0x400 ? float(rest) * 0x1p-24f : bits_as<float>(rest << 13) * 0x1p112f;
    return bits_as<float>(bits_as<uint32_t>(y) | sign);
}

static inline uint16_t bf16_bits(float x) {
    uint32_t u = bits_as<uint32_t>(x);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

#if VL == 16
static inline vf load(const BF16* p) {
    return vf(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)));
}
static inline void store(BF16* p, vf v) {
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &h, 32);
}
static inline vf load(const FP16* p) { return vf(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))); }
static inline void store(FP16* p, vf v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vf reciprocal(vf x) {  // one Newton step on 14 bits; x is never 0 or infinite where this is used
    vf r = vf(_mm512_rcp14_ps((__m512)x));
    return r * (2.0f - x * r);
}
static inline float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
static inline void transpose(vf* r) {
    __m512 a[16], b[16];
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        const __m512d x0 = _mm512_castps_pd(a[4 * i]), x1 = _mm512_castps_pd(a[4 * i + 1]);
        const __m512d y0 = _mm512_castps_pd(a[4 * i + 2]), y1 = _mm512_castps_pd(a[4 * i + 3]);
        b[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x0, y0));
        b[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x0, y0));
        b[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(x1, y1));
        b[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(x1, y1));
    }
    // b[4 i + c] holds column c of rows 4 i .. 4 i + 3 in each quarter q (column 4 q + c).
    for (int c = 0; c < 4; c++) {
        const __m512 lo01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), hi01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        const __m512 lo23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
        const __m512 hi23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        r[c] = vf(_mm512_shuffle_f32x4(lo01, lo23, 0x88));
        r[8 + c] = vf(_mm512_shuffle_f32x4(lo01, lo23, 0xdd));
        r[4 + c] = vf(_mm512_shuffle_f32x4(hi01, hi23, 0x88));
        r[12 + c] = vf(_mm512_shuffle_f32x4(hi01, hi23, 0xdd));
    }
}
// Sums over the lanes of 16 vectors: lane i of the result is the sum of r[i].
static inline vf row_sums(const vf* r) {
    __m512 pair[8], quad[4];
    for (int i = 0; i < 8; i++) {
        const __m512 x = (__m512)r[2 * i], y = (__m512)r[2 * i + 1];
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    for (int i = 0; i < 4; i++) {
        const __m512d x = _mm512_castps_pd(pair[2 * i]), y = _mm512_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; i++) {
        const __m512 x = quad[2 * i], y = quad[2 * i + 1];
        quad[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    }
    return vf(_mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd)));
}
// Two rows as pairs of bfloat16: lane n is (first[n], second[n]), what the dot instruction contracts over.
static inline vf pair_rows(vf first, vf second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                           4, 19, 3, 18, 2, 17, 1, 16, 0);
    return vf(_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first))));
}
#elif VL == 8
static inline vf load(const BF16* p) {
    return vf(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)));
}
static inline void store(BF16* p, vf v) {
    const vu u = bits_as<vu>(v);
    const vi nan = v != v;
    vu r = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    r = (vu(nan) & (u >> 16 | 0x40)) | (~vu(nan) & r);
    const vh h = __builtin_convertvector(r, vh);
    __builtin_memcpy(p, &h, sizeof h);
}
static inline vf load(const FP16* p) { return vf(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))); }
static inline void store(FP16* p, vf v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vf reciprocal(vf x) { return 1.0f / x; }
static inline float sum(vf x) {
    float t = 0;
    for (int i = 0; i < 4; i++) t += x[i] + x[i + 4];
    return t;
}
static inline void transpose(vf* r) {
    __m256 a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
        b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
        b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
        b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
    for (int c = 0; c < 4; c++) {
        r[c] = vf(_mm256_permute2f128_ps(b[c], b[4 + c], 0x20));
        r[4 + c] = vf(_mm256_permute2f128_ps(b[c], b[4 + c], 0x31));
    }
}
static inline vf row_sums(const vf* r) {
    __m256 pair[4], quad[2];
    for (int i = 0; i < 4; i++) {
        const __m256 x = (__m256)r[2 * i], y = (__m256)r[2 * i + 1];
        pair[i] = _mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
    }
    for (int i = 0; i < 2; i++) {
        const __m256d x = _mm256_castps_pd(pair[2 * i]), y = _mm256_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    const __m256 lo = _mm256_permute2f128_ps(quad[0], quad[1], 0x20), hi = _mm256_permute2f128_ps(quad[0], quad[1], 0x31);
    return vf(_mm256_add_ps(lo, hi));
}
#else
static inline vf load(const BF16* p) {
    vf v;
    for (int i = 0; i < VL; i++) v[i] = one(p[i]);
    return v;
}
static inline void store(BF16* p, vf v) {
    for (int i = 0; i < VL; i++) p[i].bits = bf16_bits(v[i]);
}
static inline vf load(const FP16* p) {
    vf v;
    for (int i = 0; i < VL; i++) v[i] = one(p[i]);
    return v;
}
static inline uint16_t fp16_bits(float x) {
    const uint32_t u = bits_as<uint32_t>(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
    if (a < 0x38800000) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        const float y = bits_as<float>(a) + 0.5f;
        return uint16_t(sign | (bits_as<uint32_t>(y) - 0x3f000000));
    }
    return uint16_t(sign | (((a + 0xfff + (a >> 13 & 1)) >> 13) - (112 << 10)));
}
static inline void store(FP16* p, vf v) {
    for (int i = 0; i < VL; i++) p[i].bits = fp16_bits(v[i]);
}
static inline vf reciprocal(vf x) { return 1.0f / x; }
static inline float sum(vf x) {
    float t = 0;
    for (int i = 0; i < VL; i++) t += x[i];
    return t;
}
static inline void transpose(vf* r) {
    for (int i = 0; i < VL; i++)
        for (int j = 0; j < i; j++) {
            const float t = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = t;
        }
}
static inline vf row_sums(const vf* r) {
    vf s;
    for (int i = 0; i < VL; i++) s[i] = sum(r[i]);
    return s;
}
#endif

// The first n of VL elements, zeros after them; the same for storing.
template <class T> static inline vf load_some(const T* p, int64_t n) {
    if (n >= VL) return load(p);
    T padded[VL] = {};
    __builtin_memcpy(padded, p, size_t(n) * sizeof(T));
    return load(padded);
}
template <class T> static inline void store_some(T* p, vf v, int64_t n) {
    if (n >= VL) return store(p, v);
    T padded[VL];
    store(padded, v);
    __builtin_memcpy(p, padded, size_t(n) * sizeof(T));
}
// What a value becomes when it is kept in the model's dtype.
static inline vf rounded(vf v, const float*) { return v; }
template <class T> static inline vf rounded(vf v, const T*) {
    T kept[VL];
    store(kept, v);
    return load(kept);
}

#if VL == 16
static inline vf rounded(vf v, const BF16*) {
    const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
    return vf(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
}
#endif

// exp(x), relative error below 2e-7 on [-87, 88], clamped outside, NaN stays NaN (polynomial: Cephes expf).
static inline vf vexp(vf x) {
#if VL == 16
    // The second operand comes through where one is NaN.
    x = vf(_mm512_max_ps(_mm512_set1_ps(-87.3f), _mm512_min_ps(_mm512_set1_ps(88.0f), (__m512)x)));
    const vf n = vf(_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), 8));
#else
    x = select(x > 88.0f, splat(88.0f), x);
    x = select(x < -87.3f, splat(-87.3f), x);
    const vf magic = splat(12582912.0f);
    const vf t = x * 1.44269504088896341f + magic;
    const vf n = t - magic;
#endif
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if VL == 16
    return vf(_mm512_scalef_ps((__m512)p, (__m512)n));
#else
    const vi scale = (bits_as<vi>(t) - bits_as<vi>(magic) + 127) << 23;
    return p * bits_as<vf>(scale);
#endif
}
static inline vf sigmoid(vf x) { return reciprocal(1.0f + vexp(-x)); }

// x * sigmoid(x), to be rounded to T next. For bfloat16 a relative error of 3e-6 turns the rounding of one value in 700.
template <class T> static inline vf silu(vf x, const T*) { return x * sigmoid(x); }
#if VL == 16
static inline vf silu(vf x, const BF16*) {
    // 2^(t - floor t) by a minimax polynomial on [0, 1), relative error below 3e-6, then 2^floor t. The bound keeps the
    // reciprocal's Newton step finite; the second operand of min comes through where one is NaN.
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(126.0f), (__m512)(x * -1.44269504088896341f));
    const vf f = vf(_mm512_reduce_ps(t, 1));
    vf p = splat(1.3534167e-2f);
    p = p * f + 5.2011464e-2f;
    p = p * f + 2.4144275e-1f;
    p = p * f + 6.9300383e-1f;
    p = p * f + 1.0000026f;
    return x * reciprocal(1.0f + vf(_mm512_scalef_ps((__m512)p, t)));
}
#endif
template <class T> static inline void silu_four(vf (&x)[4], const T* kept) {
    for (int i = 0; i < 4; i++) x[i] = silu(x[i], kept);
}
#if VL == 16
static inline void silu_four(vf (&x)[4], const BF16*) {
    __m512 t[4];
    vf f[4], p[4];
    for (int i = 0; i < 4; i++) t[i] = _mm512_min_ps(_mm512_set1_ps(126.0f), (__m512)(x[i] * -1.44269504088896341f));
    for (int i = 0; i < 4; i++) f[i] = vf(_mm512_reduce_ps(t[i], 1));
    for (int i = 0; i < 4; i++) p[i] = 1.3534167e-2f * f[i] + 5.2011464e-2f;
    for (int i = 0; i < 4; i++) p[i] = p[i] * f[i] + 2.4144275e-1f;
    for (int i = 0; i < 4; i++) p[i] = p[i] * f[i] + 6.9300383e-1f;
    for (int i = 0; i < 4; i++) p[i] = p[i] * f[i] + 1.0000026f;
    for (int i = 0; i < 4; i++) p[i] = 1.0f + vf(_mm512_scalef_ps((__m512)p[i], t[i]));
    for (int i = 0; i < 4; i++) f[i] = vf(_mm512_rcp14_ps((__m512)p[i]));
    for (int i = 0; i < 4; i++) p[i] = 2.0f - p[i] * f[i];
    for (int i = 0; i < 4; i++) x[i] = x[i] * (p[i] * f[i]);
}
#endif
// log(1 + e) for e >= 0 (polynomial: Cephes logf); below 1e-2 the series, where 1 + e would drop digits of e.
static inline vf log1p_positive(vf e) {
    const vf u = 1.0f + e;
    vi exponent = (bits_as<vi>(u) >> 23) - 126;
    vf m = bits_as<vf>((bits_as<vi>(u) & 0x007fffff) | 0x3f000000);  // [0.5, 1)
    const vi small = m < 0.70710678f;
    exponent = exponent + small;  // a true comparison is -1
    m = m + select(small, m, vf{}) - 1.0f;
    const vf z = m * m, n = __builtin_convertvector(exponent, vf);
    vf y = splat(7.0376836292e-2f);
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z + n * -2.12194440e-4f - 0.5f * z;
    const vf big = m + y + n * 0.693359375f;
    const vf series = e * (1.0f - e * (0.5f - e * (0.33333333f - e * 0.25f)));
    return select(e < 1e-2f, series, big);
}

// to[j][i] = from[i][j] for rows x cols words, both multiples of VL.
static inline void transpose_words(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i += VL)
        for (int64_t j = 0; j < cols; j += VL) {
            vf t[VL];
            for (int m = 0; m < VL; m++) t[m] = load(from + (i + m) * from_row + j);
            transpose(t);
            for (int m = 0; m < VL; m++) store(to + (j + m) * to_row + i, t[m]);
        }
}
