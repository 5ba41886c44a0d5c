// Operands of the products of the chunked form: 4-byte words, one float or two bfloat16 that are neighbours along the
// contracted dimension, and the product of four rows with a tile of columns.

struct DotF32 {
    static constexpr int pack = 1;
    static inline vf mul(vf a, vf b, vf c) { return a * b + c; }
};
#if HAVE_BF16_DOT
struct DotBF16 {
    static constexpr int pack = 2;
    static inline vf mul(vf a, vf b, vf c) { return vf(_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b)); }
};
#endif

static inline vf word(const float* p) { return bits_as<vf>(bits_as<int32_t>(*p) - vi{}); }

constexpr int TILE = VL == 16 ? 4 : 2;  // vectors of columns in a tile of four rows

// acc += a b for R rows of a and N vectors of columns of b. The sums are its own: GCC keeps those of a caller that looks at
// them in other loops on the stack, also in the loop below.
template <class Dot, int R, int N>
static inline __attribute__((always_inline)) void product(vf (&acc)[R][N], const float* a, int64_t a_row, const float* b, int64_t b_row,
                                                         int64_t depth) {
    vf sums[R][N];
#pragma GCC unroll 16
    for (int i = 0; i < R * N; i++) sums[i / N][i % N] = acc[i / N][i % N];
    for (int64_t d = 0; d < depth; d++, a++, b += b_row) {
        vf bv[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) bv[n] = load(b + n * VL);
#pragma GCC unroll 4
        for (int m = 0; m < R; m++) {
            const vf av = word(a + m * a_row);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[m][n] = Dot::mul(av, bv[n], sums[m][n]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * N; i++) acc[i / N][i % N] = sums[i / N][i % N];
}

// Four rows as words of operand B, that is pairs along the rows (or plain rows where words are floats).
template <class Dot, int N> static inline void store_words(const vf (&acc)[4][N], float* to, int64_t row) {
    if constexpr (Dot::pack == 1) {
        for (int m = 0; m < 4; m++)
            for (int n = 0; n < N; n++) store(to + (row + m) * N * VL + n * VL, acc[m][n]);
    }
#if HAVE_BF16_DOT
    else
        for (int m = 0; m < 2; m++)
            for (int n = 0; n < N; n++)
                store(to + (row / 2 + m) * N * VL + n * VL, pair_rows(acc[2 * m][n], acc[2 * m + 1][n]));
#endif
}

// Columns of the state and of X lie in tiles, so that what a product runs over again and again is one piece of the
// first-level cache. The tile of column v (a multiple of VL) starts at `first` times the rows.
struct Columns {
    int64_t first, width;
};
static inline Columns columns(int64_t v, int64_t vp) {
    const int64_t first = v - v % (TILE * VL);
    return first + TILE * VL <= vp ? Columns{first, TILE * VL} : Columns{v, VL};
}

static inline int64_t tiles(int64_t vp) { return vp / (TILE * VL) + vp % (TILE * VL) / VL; }

// One row of operand A from floats.
template <class Dot> static inline void row_words(float* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        if constexpr (Dot::pack == 1) store(to + i, load(from + i));
        else store(reinterpret_cast<BF16*>(to) + i, load(from + i));
    }
}
