// The chunked form, 64 tokens at a time, solved directly. With G the running sum of log decays inside the chunk,
// D[i][j] = exp(G_i - G_j) for j <= i, A = strict_lower(beta_i (k_i . k_j) D[i][j]) and S the state [k, v] before it:
//     (I + A) X = diag(beta) (V - diag(e^G) K S),   O = diag(e^G) Q S + lower(Q K^T * D) X,
//     S <- e^G_last S + K^T diag(D[last]) X.
// D is built as products of decays, row from row: no exponential of a difference, so nothing can overflow or lose digits.
// Inside, the state is kept as [k, v] in float; operands of the products are 4-byte words: one float, or two bfloat16 that
// are neighbours along the contracted dimension.

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

template <class Dot, int N, class First, class Last>
static inline __attribute__((always_inline)) void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                                                      int64_t col, const First& first, const Last& last) {
    vf acc[4][N];
    for (int m = 0; m < 4; m++)
        for (int n = 0; n < N; n++) acc[m][n] = first(m, col + n * VL);
    b += col;
    for (int64_t d = 0; d < depth; d++, a++, b += b_row) {
        vf bv[N];
        for (int n = 0; n < N; n++) bv[n] = load(b + n * VL);
        for (int m = 0; m < 4; m++) {
            const vf av = word(a + m * a_row);
            for (int n = 0; n < N; n++) acc[m][n] = Dot::mul(av, bv[n], acc[m][n]);
        }
    }
    last(acc, col, std::integral_constant<int, N>());
}

// Four rows of a product: acc = first + a b for columns 0 .. cols - 1 (cols a multiple of VL), given to `last`.
template <class Dot, class First, class Last>
static inline __attribute__((always_inline)) void four_rows(const float* a, int64_t a_row, const float* b, int64_t b_row,
                                                           int64_t depth, int64_t cols, const First& first, const Last& last) {
    int64_t col = 0;
    for (; col + TILE * VL <= cols; col += TILE * VL) tile<Dot, TILE>(a, a_row, b, b_row, depth, col, first, last);
    for (; col < cols; col += VL) tile<Dot, 1>(a, a_row, b, b_row, depth, col, first, last);
}

template <int N> static inline void store_tile(vf (&acc)[4][N], float* to, int64_t row, int64_t col) {
    for (int m = 0; m < 4; m++)
        for (int n = 0; n < N; n++) store(to + m * row + col + n * VL, acc[m][n]);
}

// Two rows of four as words of operand B, that is pairs along the rows (or plain rows where words are floats).
template <class Dot, int N>
static inline void store_words(vf (&acc)[4][N], float* to, int64_t word_row, int64_t row, int64_t col) {
    if constexpr (Dot::pack == 1) store_tile<N>(acc, to + row * word_row, word_row, col);
#if HAVE_BF16_DOT
    else
        for (int m = 0; m < 2; m++)
            for (int n = 0; n < N; n++)
                store(to + (row / 2 + m) * word_row + col + n * VL, pair_rows(acc[2 * m][n], acc[2 * m + 1][n]));
#endif
}

// One row of operand A from floats.
template <class Dot> static inline void row_words(float* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        if constexpr (Dot::pack == 1) store(to + i, load(from + i));
        else store(reinterpret_cast<BF16*>(to) + i, load(from + i));
    }
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

struct Chunk {
    int64_t kd, kw;             // words in a row of K and Q; K rounded up so that they fill vectors
    float *kq_k, *kq_q;         // K and Q as operand A, [CHUNK, kd]
    float* kt;                  // K^T as operand B, [kd, CHUNK]
    float* ka;                  // K^T as operand A, [kw, CHUNK / pack]
    float *kk, *qk;             // K K^T and Q K^T, [CHUNK, CHUNK]
    float *a, *p;               // -A [CHUNK, CHUNK], lower(Q K^T * D) as operand A [CHUNK, CHUNK / pack]
    float *grown, *shrunk;      // e^G_i and D[last][i], [CHUNK]
    float *x, *xw, *xs;         // X [CHUNK, vp], as operand B, and scaled by D[last] as operand B
    float *state, *state_words; // per value head [kw, vp] and [kd, vp]
};

static int64_t chunk_bytes(const Call& c) {
    const int64_t kw = up(c.k, 2 * VL), vp = up(c.v, VL), ratio = c.hv / c.hk;
    return 4 * (5 * CHUNK * kw + 4 * CHUNK * CHUNK + 2 * CHUNK + 3 * CHUNK * vp + 2 * ratio * kw * vp) + 64 * 16;
}

// K, Q and their products for n tokens (m = n rounded up to 4, w = rounded up so that pairs of tokens fill vectors).
template <class Dot> static void chunk_keys(const Unit& u, const Chunk& b, int64_t n, int64_t m, int64_t w) {
    for (int64_t t = n; t < w; t++) {
        std::memset(u.q + t * u.kp, 0, size_t(u.kp) * 4);
        std::memset(u.k + t * u.kp, 0, size_t(u.kp) * 4);
    }
    for (int64_t t = 0; t < w; t++) {
        row_words<Dot>(b.kq_k + t * b.kd, u.k + t * u.kp, u.kp);
        row_words<Dot>(b.kq_q + t * b.kd, u.q + t * u.kp, u.kp);
    }
    transpose_words(b.kq_k, b.kd, b.kt, CHUNK, w, b.kd);
    if constexpr (Dot::pack == 1) {
        b.ka == b.kt ? void() : transpose_words(b.kq_k, b.kd, b.ka, CHUNK, w, b.kd);
    }
#if HAVE_BF16_DOT
    else
        for (int64_t t = 0; t < w; t += 2 * VL)
            for (int64_t i = 0; i < u.kp; i += VL) {
                vf pairs[VL];
                for (int j = 0; j < VL; j++) pairs[j] = pair_rows(load(u.k + (t + 2 * j) * u.kp + i), load(u.k + (t + 2 * j + 1) * u.kp + i));
                transpose(pairs);
                for (int j = 0; j < VL; j++) store(b.ka + (i + j) * (CHUNK / 2) + t / 2, pairs[j]);
            }
#endif
    const auto zero = [](int, int64_t) { return vf{}; };
    for (int64_t i = 0; i < m; i += 4) {
        const int64_t cols = up(i + 4, VL);  // later tokens are not looked at
        four_rows<Dot>(b.kq_k + i * b.kd, b.kd, b.kt, CHUNK, b.kd, cols, zero,
                       [&](auto& acc, int64_t col, auto N) { store_tile<N>(acc, b.kk + i * CHUNK, CHUNK, col); });
        four_rows<Dot>(b.kq_q + i * b.kd, b.kd, b.kt, CHUNK, b.kd, cols, zero,
                       [&](auto& acc, int64_t col, auto N) { store_tile<N>(acc, b.qk + i * CHUNK, CHUNK, col); });
    }
}

// Decays of one value head: -A, the operand P, e^G and D[last].
template <class Dot> static void chunk_decays(const Chunk& b, const float* alpha, const float* beta, int64_t n, int64_t m) {
    constexpr int N = CHUNK / VL;
    float eye[2 * VL] = {};
    eye[VL] = 1.0f;
    vf d[N] = {};
    float grown = 1.0f;
    for (int64_t i = 0; i < m; i++) {
        const float step = i < n ? alpha[i] : 1.0f, scale = i < n ? -beta[i] : 0.0f;
        const int64_t last = i / VL;
        grown *= step;
        b.grown[i] = grown;
        for (int64_t j = 0; j <= last; j++) {
            d[j] = d[j] * step;
            store(b.a + i * CHUNK + j * VL, load(b.kk + i * CHUNK + j * VL) * d[j] * scale);
        }
        if (i < n) d[last] = d[last] + load(eye + VL - i % VL);
        float p[CHUNK];
        for (int64_t j = 0; j <= last; j++) store(p + j * VL, load(b.qk + i * CHUNK + j * VL) * d[j]);
        row_words<Dot>(b.p + i * (CHUNK / Dot::pack), p, (last + 1) * VL);
    }
    for (int64_t j = 0; j <= (m - 1) / VL; j++) store(b.shrunk + j * VL, d[j]);
}

template <class IO, class Dot>
static void chunk_head(const Unit& u, const Chunk& b, int64_t h, int64_t t0, int64_t n, int64_t m, bool has_state, bool more) {
    const Call& c = *u.c;
    float* state = b.state + h * b.kw * u.vp;
    float* words = Dot::pack == 1 ? state : b.state_words + h * b.kd * u.vp;
    const float *beta = u.beta + h * CHUNK, *v = u.v + h * CHUNK * u.vp;
    chunk_decays<Dot>(b, u.alpha + h * CHUNK, beta, n, m);
    const auto zero = [](int, int64_t) { return vf{}; };
    for (int64_t i = 0; i < m; i += 4) {
        const auto right = [&](auto& acc, int64_t col, auto N) {
            for (int r = 0; r < 4; r++)
                for (int j = 0; j < N; j++) {
                    const int64_t at = (i + r) * u.vp + col + j * VL;
                    const vf x = i + r < n ? beta[i + r] * (load(v + at) - b.grown[i + r] * acc[r][j]) : vf{};
                    store(b.x + at, x);
                }
        };
        four_rows<Dot>(b.kq_k + i * b.kd, b.kd, words, u.vp, has_state ? b.kd : 0, u.vp, zero, right);
    }
    // Forward substitution, four rows at a time.
    for (int64_t i = 0; i < m; i += 4) {
        const float* a = b.a + i * CHUNK + i;
        four_rows<DotF32>(
            b.a + i * CHUNK, CHUNK, b.x, u.vp, i, u.vp, [&](int r, int64_t col) { return load(b.x + (i + r) * u.vp + col); },
            [&](auto& acc, int64_t col, auto N) {
                for (int j = 0; j < N; j++) {
                    acc[1][j] += a[CHUNK] * acc[0][j];
                    acc[2][j] += a[2 * CHUNK] * acc[0][j] + a[2 * CHUNK + 1] * acc[1][j];
                    acc[3][j] += a[3 * CHUNK] * acc[0][j] + a[3 * CHUNK + 1] * acc[1][j] + a[3 * CHUNK + 2] * acc[2][j];
                }
                store_tile<N>(acc, b.x + i * u.vp, u.vp, col);
                if (Dot::pack > 1) store_words<Dot, N>(acc, b.xw, u.vp, i, col);
                for (int r = 0; r < 4; r++)
                    for (int j = 0; j < N; j++) acc[r][j] *= b.shrunk[i + r];
                store_words<Dot, N>(acc, b.xs, u.vp, i, col);
            });
    }
    const float* x = Dot::pack == 1 ? b.x : b.xw;
    const int64_t head = u.group * u.ratio + h;
    for (int64_t i = 0; i < m; i += 4) {
        const auto grow = [&](auto& acc, int64_t col, auto N) {
            for (int r = 0; r < 4; r++)
                for (int j = 0; j < N; j++) store(u.out + (i + r) * u.vp + col + j * VL, acc[r][j] * b.grown[i + r]);
        };
        const auto give = [&](auto& acc, int64_t col, auto N) {
            for (int r = 0; r < 4 && i + r < n; r++) {
                IO* to = reinterpret_cast<IO*>(c.core) + u.row(t0 + i + r) * c.core_row + head * c.v;
                for (int j = 0; j < N; j++) store_some(to + col + j * VL, acc[r][j], c.v - col - j * VL);
            }
        };
        const int64_t depth = (i + 4) / Dot::pack;
        if (has_state) {
            four_rows<Dot>(b.kq_q + i * b.kd, b.kd, words, u.vp, b.kd, u.vp, zero, grow);
            four_rows<Dot>(b.p + i * (CHUNK / Dot::pack), CHUNK / Dot::pack, x, u.vp, depth, u.vp,
                           [&](int r, int64_t col) { return load(u.out + (i + r) * u.vp + col); }, give);
        } else {
            four_rows<Dot>(b.p + i * (CHUNK / Dot::pack), CHUNK / Dot::pack, x, u.vp, depth, u.vp, zero, give);
        }
    }
    const float all = b.grown[n - 1];
    for (int64_t i = 0; i < u.kp; i += 4)
        four_rows<Dot>(
            b.ka + i * (CHUNK / Dot::pack), CHUNK / Dot::pack, b.xs, u.vp, m / Dot::pack, u.vp,
            [&](int r, int64_t col) { return has_state ? load(state + (i + r) * u.vp + col) * all : vf{}; },
            [&](auto& acc, int64_t col, auto N) {
                store_tile<N>(acc, state + i * u.vp, u.vp, col);
                if (Dot::pack > 1 && more) store_words<Dot, N>(acc, words, u.vp, i, col);
            });
}

// The state of one value head between the cache, [v, k] in its dtype, and [k, v] in float.
static void fetch_state(const Unit& u, const Chunk& b, int64_t h, int64_t slot) {
    const Call& c = *u.c;
    float* state = b.state + h * b.kw * u.vp;
    for (int64_t v = 0; v < u.vp; v += VL)
        for (int64_t k = 0; k < u.kp; k += VL) {
            vf t[VL];
            for (int64_t j = 0; j < VL; j++) {
                const int64_t at = slot * c.ssm_slot + ((u.group * u.ratio + h) * c.v + v + j) * c.k + k;
                t[j] = v + j < c.v ? any_vector(c.ssm_state, c.state, at, c.k - k) : vf{};
            }
            transpose(t);
            for (int64_t j = 0; j < VL; j++) store(state + (k + j) * u.vp + v, t[j]);
        }
}
static void keep_state(const Unit& u, const Chunk& b, int64_t h, int64_t slot) {
    const Call& c = *u.c;
    const float* state = b.state + h * b.kw * u.vp;
    for (int64_t v = 0; v < u.vp; v += VL)
        for (int64_t k = 0; k < u.kp; k += VL) {
            vf t[VL];
            for (int64_t j = 0; j < VL; j++) t[j] = load(state + (k + j) * u.vp + v);
            transpose(t);
            for (int64_t j = 0; j < VL && v + j < c.v; j++) {
                const int64_t at = slot * c.ssm_slot + ((u.group * u.ratio + h) * c.v + v + j) * c.k + k;
                if (c.state == gdn::F32) store_some(reinterpret_cast<float*>(c.ssm_state) + at, t[j], c.k - k);
                else if (c.state == gdn::BF16_) store_some(reinterpret_cast<BF16*>(c.ssm_state) + at, t[j], c.k - k);
                else store_some(reinterpret_cast<FP16*>(c.ssm_state) + at, t[j], c.k - k);
            }
        }
}

template <class IO, class Dot> static void run_chunks(const Unit& u, Arena& arena) {
    const Call& c = *u.c;
    const Sequence& s = *u.s;
    Chunk b;
    b.kw = up(c.k, 2 * VL);
    b.kd = Dot::pack == 1 ? u.kp : b.kw / 2;
    b.kq_k = arena.take<float>(CHUNK * b.kw);
    b.kq_q = arena.take<float>(CHUNK * b.kw);
    b.kt = arena.take<float>(CHUNK * b.kw);
    b.ka = Dot::pack == 1 ? b.kt : arena.take<float>(CHUNK * b.kw);
    b.kk = arena.take<float>(CHUNK * CHUNK);
    b.qk = arena.take<float>(CHUNK * CHUNK);
    b.a = arena.take<float>(CHUNK * CHUNK);
    b.p = arena.take<float>(CHUNK * CHUNK);
    b.grown = arena.take<float>(CHUNK);
    b.shrunk = arena.take<float>(CHUNK);
    b.x = arena.take<float>(CHUNK * u.vp);
    b.xw = arena.take<float>(CHUNK * u.vp);
    b.xs = arena.take<float>(CHUNK * u.vp);
    b.state = arena.take<float>(u.ratio * b.kw * u.vp);
    b.state_words = arena.take<float>(u.ratio * b.kw * u.vp);
    if (Dot::pack == 2) {
        // Columns between K rounded to vectors and to pairs of vectors are never written again.
        std::memset(b.kq_k, 0, size_t(CHUNK * b.kd) * 4);
        std::memset(b.kq_q, 0, size_t(CHUNK * b.kd) * 4);
        if (u.kp < b.kw) std::memset(b.state_words, 0, size_t(u.ratio * b.kd * u.vp) * 4);
    }
    bool has_state = s.source >= 0;
    if (has_state)
        for (int64_t h = 0; h < u.ratio; h++) {
            fetch_state(u, b, h, s.source);
#if HAVE_BF16_DOT
            if (Dot::pack == 2)
                for (int64_t i = 0; i < u.kp; i += 2)
                    for (int64_t j = 0; j < u.vp; j += VL) {
                        const float* row = b.state + (h * b.kw + i) * u.vp + j;
                        store(b.state_words + (h * b.kd + i / 2) * u.vp + j, pair_rows(load(row), load(row + u.vp)));
                    }
#endif
        }
    int64_t write = s.writes;
    for (int64_t t0 = 0; t0 < s.count;) {
        int64_t n = s.count - t0 < CHUNK ? s.count - t0 : CHUNK;
        // A state that is asked for on the way ends a chunk.
        if (write < s.writes_end && u.work->writes[write].token < t0 + n) n = u.work->writes[write].token + 1 - t0;
        const int64_t m = up(n, 4), w = up(n, Dot::pack * VL);
        const bool last = t0 + n == s.count;
        prepare<IO>(u, t0, n);
        chunk_keys<Dot>(u, b, n, m, w);
        for (int64_t h = 0; h < u.ratio; h++) chunk_head<IO, Dot>(u, b, h, t0, n, m, has_state, !last);
        has_state = true;
        t0 += n;
        for (; write < s.writes_end && u.work->writes[write].token == t0 - 1; write++) {
            const int64_t slot = u.work->writes[write].slot;
            for (int64_t h = 0; h < u.ratio; h++) keep_state(u, b, h, slot);
            keep_inputs<IO>(u, t0 - 1, slot);
        }
    }
    if (s.final < 0) return;
    for (int64_t h = 0; h < u.ratio; h++) keep_state(u, b, h, s.final);
    keep_inputs<IO>(u, s.count - 1, s.final);
}
