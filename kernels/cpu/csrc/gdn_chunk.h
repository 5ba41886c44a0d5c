// The chunked form, 64 tokens at a time before there is a state and 32 from then on, solved directly. With G the running sum of log decays inside the chunk,
// D[i][j] = exp(G_i - G_j) for j <= i, A = strict_lower(beta_i (k_i . k_j) D[i][j]) and S the state [k, v] before it:
//     (I + A) X = diag(beta) (V - diag(e^G) K S),   O = diag(e^G) Q S + lower(Q K^T * D) X,
//     S <- e^G_last S + K^T diag(D[last]) X.
// D is built as products of decays, row from row: no exponential of a difference, so nothing can overflow or lose digits.
// Products take q and k as the convolution rounded them, exact in bfloat16; D takes the scales of k on its columns, rows the
// others: rounding normalised q and k would stay whole where each q is nearly orthogonal to the keys that it meets.
// Inside, the state is kept as [k, v] in float; operands of the products are 4-byte words: one float, or two bfloat16 that
// are neighbours along the contracted dimension. Rounding A and X to bfloat16 is amplified by A: where keys are nearly equal
// and decay little, X are differences that cancel in O. The relative error of O is 3.1e-3 on random inputs and 3.5e-3 where
// the mean over rows of sum_j A[i][j]^2 is near 1/2 (TAME), and grows with it. A head whose A is larger than TAME in some
// chunk goes through that chunk with A, P, X and K^T in float, at two thirds of the speed; K S and Q S, which nothing
// amplifies, stay in bfloat16: the error is below 2.8e-3 then.

struct Chunk {
    int64_t kd, kw;             // words in a row of K and Q; K rounded up so that they fill vectors
    float *kq_k, *kq_q;         // K and Q as operand A, [CHUNK, kd]
    float* kt;                  // K^T as operand B, [kd, CHUNK]
    float* ka;                  // K^T as operand A, [kw, CHUNK / pack]
    float *kk, *qk;             // K K^T and Q K^T, [CHUNK, CHUNK]
    float *a, *p;               // -A and lower(Q K^T * D) as operands A, [CHUNK, CHUNK / pack]
    float* near;                // -A of the four tokens that a row is solved with, [CHUNK, 4]
    float *grown, *grown_k, *grown_q; // e^G_i, and times the scales of k and of q, [CHUNK]
    float* shrunk;              // D[last][i] times the scale of k, [CHUNK]
    float *x, *xs;              // a tile of X, and of X scaled by D[last], as operands B, [CHUNK / pack, TILE * VL]
    float *state, *state_words; // per value head [kw, vp], and as operand B [kd, vp], both in tiles
};

static int64_t chunk_bytes(const Call& c) {
    const int64_t kw = up(c.k, 2 * VL), vp = up(c.v, VL), ratio = c.hv / c.hk;
    const int64_t chunk = 4 * CHUNK * kw + 4 * CHUNK * CHUNK + 8 * CHUNK + 2 * CHUNK * TILE * VL;
    return 4 * ((1 + HAVE_BF16_DOT) * chunk + 2 * ratio * kw * vp) + 64 * 36;
}

// Four rows of K K^T and of Q K^T, N vectors of columns.
template <class Dot, int N> static inline void key_products(const Chunk& b, int64_t i, int64_t col) {
    vf kk[4][N] = {}, qk[4][N] = {};
    const float *k = b.kq_k + i * b.kd, *q = b.kq_q + i * b.kd, *t = b.kt + col;
    for (int64_t d = 0; d < b.kd; d++, k++, q++, t += CHUNK) {
        vf tv[N];
        for (int n = 0; n < N; n++) tv[n] = load(t + n * VL);
        for (int r = 0; r < 4; r++) {
            const vf kv = word(k + r * b.kd), qv = word(q + r * b.kd);
            for (int n = 0; n < N; n++) {
                kk[r][n] = Dot::mul(kv, tv[n], kk[r][n]);
                qk[r][n] = Dot::mul(qv, tv[n], qk[r][n]);
            }
        }
    }
    for (int r = 0; r < 4; r++)
        for (int n = 0; n < N; n++) {
            store(b.kk + (i + r) * CHUNK + col + n * VL, kk[r][n]);
            store(b.qk + (i + r) * CHUNK + col + n * VL, qk[r][n]);
        }
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
    for (int64_t i = 0; i < m; i += 4) {
        const int64_t cols = up(i + 4, VL);  // later tokens are not looked at
        constexpr int N = VL == 16 ? 2 : 1;  // 8 N sums are all that the registers hold
        int64_t col = 0;
        for (; col + N * VL <= cols; col += N * VL) key_products<Dot, N>(b, i, col);
        if (col < cols) key_products<Dot, 1>(b, i, col);
    }
}

constexpr float TAME = 0.5f;

// Decays of one value head: the operands -A and P, e^G and D[last]. Returns the sum of the squares of A.
template <class Dot> static float chunk_decays(const Unit& u, const Chunk& b, int64_t h, int64_t n, int64_t m) {
    const float *alpha = u.alpha + h * CHUNK, *beta = u.beta + h * CHUNK;
    constexpr int N = CHUNK / VL;
    float eye[2 * VL] = {};
    eye[VL] = 1.0f;
    vf d[N] = {}, squares = {};
    float grown = 1.0f;
    for (int64_t i = 0; i < m; i++) {
        const bool real = i < n;
        const float step = real ? alpha[i] : 1.0f, k_scale = real ? u.k_scale[i] : 0.0f, q_scale = real ? u.q_scale[i] : 0.0f;
        const float scale = real ? -beta[i] * k_scale : 0.0f;
        const int64_t last = i / VL;
        float a[CHUNK], p[CHUNK];
        grown *= step;
        b.grown[i] = grown;
        b.grown_k[i] = grown * k_scale;
        b.grown_q[i] = grown * q_scale;
        for (int64_t j = 0; j <= last; j++) {
            d[j] = d[j] * step;
            const vf entries = load(b.kk + i * CHUNK + j * VL) * d[j] * scale;  // of tokens before i only: others' d is 0
            squares = entries * entries + squares;
            store(a + j * VL, entries);
        }
        if (real) d[last] = d[last] + load(eye + VL - i % VL) * k_scale;
        for (int64_t j = 0; j <= last; j++) store(p + j * VL, load(b.qk + i * CHUNK + j * VL) * d[j] * q_scale);
        std::memcpy(b.near + 4 * i, a + i - i % 4, 16);
        row_words<Dot>(b.a + i * (CHUNK / Dot::pack), a, (last + 1) * VL);
        row_words<Dot>(b.p + i * (CHUNK / Dot::pack), p, (last + 1) * VL);
    }
    for (int64_t j = 0; j <= (m - 1) / VL; j++) store(b.shrunk + j * VL, d[j]);
    return sum(squares);
}

// All that a chunk does to N vectors of columns of one value head; columns never meet. Dot is for products with the state,
// In for those inside the chunk.
template <class IO, class Dot, class In, int N>
static void chunk_columns(const Unit& u, const Chunk& b, Ahead& ahead, int64_t h, int64_t col, int64_t t0, int64_t n, int64_t m, bool has_state, bool more) {
    const Call& c = *u.c;
    constexpr int64_t cols = N * VL, row_of_a = CHUNK / In::pack;
    float* state = b.state + (h * u.vp + col) * b.kw;
    float* words = Dot::pack == 1 ? state : b.state_words + (h * u.vp + col) * b.kd;
    const float *beta = u.beta + h * CHUNK, *v = u.v + h * CHUNK * u.vp + col;
    // X by forward substitution: what earlier tokens leave of the right-hand side, then the four rows among themselves.
    for (int64_t i = 0; i < m; i += 4) {
        ahead.go_on();
        vf x[4][N] = {};
        if (has_state) product<Dot>(x, b.kq_k + i * b.kd, b.kd, words, cols, b.kd);
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < N; j++)
                x[r][j] = i + r < n ? beta[i + r] * (load(v + (i + r) * u.vp + j * VL) - b.grown_k[i + r] * x[r][j]) : vf{};
        product<In>(x, b.a + i * row_of_a, row_of_a, b.x, cols, i / In::pack);
        const float* a = b.near + 4 * i;
        for (int j = 0; j < N; j++) {
            x[1][j] += a[4] * x[0][j];
            x[2][j] += a[8] * x[0][j] + a[9] * x[1][j];
            x[3][j] += a[12] * x[0][j] + a[13] * x[1][j] + a[14] * x[2][j];
        }
        store_words<In, N>(x, b.x, i);
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < N; j++) x[r][j] *= b.shrunk[i + r];
        store_words<In, N>(x, b.xs, i);
    }
    const int64_t head = u.group * u.ratio + h;
    for (int64_t i = 0; i < m; i += 4) {
        ahead.go_on();
        vf out[4][N] = {};
        if (has_state) {
            product<Dot>(out, b.kq_q + i * b.kd, b.kd, words, cols, b.kd);
            for (int r = 0; r < 4; r++)
                for (int j = 0; j < N; j++) out[r][j] *= b.grown_q[i + r];
        }
        product<In>(out, b.p + i * row_of_a, row_of_a, b.x, cols, (i + 4) / In::pack);
        for (int r = 0; r < 4 && i + r < n; r++) {
            IO* to = reinterpret_cast<IO*>(c.core) + u.row(t0 + i + r) * c.core_row + head * c.v + col;
            for (int j = 0; j < N; j++) store_some(to + j * VL, out[r][j], c.v - col - j * VL);
        }
    }
    const float all = b.grown[n - 1];
    // The slot that the last state goes to comes into the cache meanwhile.
    const int64_t item = int64_t(gdn::size_of(c.state)), slot = more ? -1 : u.s->final;
    const char* kept = c.ssm_state + (slot * c.ssm_slot + (head * c.v + col) * c.k) * item;
    const int64_t bytes = slot < 0 ? 0 : (c.v - col < cols ? c.v - col : cols) * c.k * item;
    const int64_t each = up(bytes / (u.kp / 4), 64);
    int64_t asked = 0;
    for (int64_t i = 0; i < u.kp; i += 4) {
        for (int64_t end = asked + each; asked < end && asked < bytes; asked += 64) ask(kept + asked);
        vf s[4][N] = {};
        if (has_state)
            for (int r = 0; r < 4; r++)
                for (int j = 0; j < N; j++) s[r][j] = load(state + (i + r) * cols + j * VL) * all;
        product<In>(s, b.ka + i * row_of_a, row_of_a, b.xs, cols, m / In::pack);
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < N; j++) store(state + (i + r) * cols + j * VL, s[r][j]);
        if (Dot::pack > 1 && more) store_words<Dot, N>(s, words, i);
    }
}

template <class IO, class Dot, class In>
static void chunk_head(const Unit& u, const Chunk& b, Ahead& ahead, int64_t h, int64_t t0, int64_t n, int64_t m, bool has_state, bool more) {
    for (int64_t col = 0; col < u.vp;) {
        const int64_t width = columns(col, u.vp).width;
        if (width > VL) chunk_columns<IO, Dot, In, TILE>(u, b, ahead, h, col, t0, n, m, has_state, more);
        else chunk_columns<IO, Dot, In, 1>(u, b, ahead, h, col, t0, n, m, has_state, more);
        col += width;
    }
}

// The state of one value head between the cache, [v, k] in its dtype, and [k, v] in float.
static void fetch_state(const Unit& u, const Chunk& b, int64_t h, int64_t slot) {
    const Call& c = *u.c;
    for (int64_t v = 0; v < u.vp; v += VL) {
        const Columns at = columns(v, u.vp);
        float* state = b.state + (h * u.vp + at.first) * b.kw + v - at.first;
        for (int64_t k = 0; k < u.kp; k += VL) {
            vf t[VL];
            for (int64_t j = 0; j < VL; j++) {
                const int64_t at = slot * c.ssm_slot + ((u.group * u.ratio + h) * c.v + v + j) * c.k + k;
                t[j] = v + j < c.v ? any_vector(c.ssm_state, c.state, at, c.k - k) : vf{};
            }
            transpose(t);
            for (int64_t j = 0; j < VL; j++) store(state + (k + j) * at.width, t[j]);
        }
    }
}
static void keep_state(const Unit& u, const Chunk& b, int64_t h, int64_t slot) {
    const Call& c = *u.c;
    for (int64_t v = 0; v < u.vp; v += VL) {
        const Columns tile = columns(v, u.vp);
        const float* state = b.state + (h * u.vp + tile.first) * b.kw + v - tile.first;
        for (int64_t k = 0; k < u.kp; k += VL) {
            vf t[VL];
            for (int64_t j = 0; j < VL; j++) t[j] = load(state + (k + j) * tile.width);
            transpose(t);
            for (int64_t j = 0; j < VL && v + j < c.v; j++) {
                const int64_t at = slot * c.ssm_slot + ((u.group * u.ratio + h) * c.v + v + j) * c.k + k;
                if (c.state == gdn::F32) store_some(reinterpret_cast<float*>(c.ssm_state) + at, t[j], c.k - k);
                else if (c.state == gdn::BF16_) store_some(reinterpret_cast<BF16*>(c.ssm_state) + at, t[j], c.k - k);
                else store_some(reinterpret_cast<FP16*>(c.ssm_state) + at, t[j], c.k - k);
            }
        }
    }
}

template <class Dot> static Chunk carve(const Unit& u, Arena& arena) {
    Chunk b;
    b.kw = up(u.c->k, 2 * VL);
    b.kd = Dot::pack == 1 ? u.kp : b.kw / 2;
    b.kq_k = arena.take<float>(CHUNK * b.kd);
    b.kq_q = arena.take<float>(CHUNK * b.kd);
    b.kt = arena.take<float>(CHUNK * b.kd);
    b.ka = Dot::pack == 1 ? b.kt : arena.take<float>(CHUNK / Dot::pack * b.kw);
    b.kk = arena.take<float>(CHUNK * CHUNK);
    b.qk = arena.take<float>(CHUNK * CHUNK);
    b.a = arena.take<float>(CHUNK * CHUNK / Dot::pack);
    b.p = arena.take<float>(CHUNK * CHUNK / Dot::pack);
    b.near = arena.take<float>(CHUNK * 4);
    b.grown = arena.take<float>(CHUNK);
    b.grown_k = arena.take<float>(CHUNK);
    b.grown_q = arena.take<float>(CHUNK);
    b.shrunk = arena.take<float>(CHUNK);
    b.x = arena.take<float>(CHUNK / Dot::pack * TILE * VL);
    b.xs = arena.take<float>(CHUNK / Dot::pack * TILE * VL);
    // Columns between K rounded to vectors and to pairs of vectors are never written again.
    if (Dot::pack > 1) std::memset(b.kq_k, 0, size_t(CHUNK * b.kd) * 4);
    if (Dot::pack > 1) std::memset(b.kq_q, 0, size_t(CHUNK * b.kd) * 4);
    return b;
}

#if HAVE_BF16_DOT
// The state of one value head as operand B.
static void state_to_words(const Unit& u, const Chunk& b, int64_t h) {
    for (int64_t v = 0; v < u.vp; v += VL) {
        const Columns at = columns(v, u.vp);
        const float* from = b.state + (h * u.vp + at.first) * b.kw + v - at.first;
        float* to = b.state_words + (h * u.vp + at.first) * b.kd + v - at.first;
        for (int64_t i = 0; i < u.kp; i += 2)
            store(to + i / 2 * at.width, pair_rows(load(from + i * at.width), load(from + (i + 1) * at.width)));
    }
}
#endif

template <class IO, class Dot> static void run_chunks(Unit& u, Arena& arena, Ahead& ahead) {
    const Call& c = *u.c;
    const Sequence& s = *u.s;
    Chunk b = carve<Dot>(u, arena);
    b.state = arena.take<float>(u.ratio * b.kw * u.vp);
    b.state_words = arena.take<float>(u.ratio * b.kd * u.vp);
#if HAVE_BF16_DOT
    // Keys and decays in float, and what a chunk with float inside and a state in bfloat16 pairs works with.
    Chunk exact = b, mixed = b;
    if constexpr (Dot::pack > 1) {
        mixed = exact = carve<DotF32>(u, arena);
        mixed.kd = b.kd, mixed.kq_k = b.kq_k, mixed.kq_q = b.kq_q;
        mixed.state = b.state, mixed.state_words = b.state_words;
        if (u.kp < b.kw) std::memset(b.state_words, 0, size_t(u.ratio * b.kd * u.vp) * 4);
    }
#endif
    bool has_state = s.source >= 0;
    if (has_state)
        for (int64_t h = 0; h < u.ratio; h++) {
            fetch_state(u, b, h, s.source);
#if HAVE_BF16_DOT
            if (Dot::pack > 1) state_to_words(u, b, h);
#endif
        }
    int64_t write = s.writes;
    for (int64_t t0 = 0; t0 < s.count;) {
        int64_t n = chunk_tokens(s, t0);
        // A state that is asked for on the way ends a chunk.
        if (write < s.writes_end && u.work->writes[write].token < t0 + n) n = u.work->writes[write].token + 1 - t0;
        const int64_t m = up(n, 4), w = up(n, Dot::pack * VL);
        const bool last = t0 + n == s.count;
        u.expected = ahead.has(u.index, t0);
        prepare<IO>(u, t0, n);
        if (last) expect_unit(*u.work, u.next);
        ahead.start(*u.work, last ? u.next : u.index, last ? 0 : t0 + n, u.ratio * tiles(u.vp) * (m / 2));
        chunk_keys<Dot>(u, b, n, m, w);
        bool exact_keys = false;
        for (int64_t h = 0; h < u.ratio; h++) {
            const float squares = chunk_decays<Dot>(u, b, h, n, m);
#if HAVE_BF16_DOT
            if constexpr (Dot::pack > 1)
                if (squares > TAME * float(n)) {
                    if (!exact_keys) chunk_keys<DotF32>(u, exact, n, m, up(n, VL));
                    exact_keys = true;
                    chunk_decays<DotF32>(u, exact, h, n, m);
                    chunk_head<IO, Dot, DotF32>(u, mixed, ahead, h, t0, n, m, has_state, !last);
                    continue;
                }
#endif
            chunk_head<IO, Dot, Dot>(u, b, ahead, h, t0, n, m, has_state, !last);
        }
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
