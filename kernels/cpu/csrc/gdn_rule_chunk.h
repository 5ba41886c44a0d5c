// The gated delta rule in chunks of 64 tokens, forward and backward, everything in float; included by gdn_rule.cpp.
// For one head, with a the decays, E = erase * k, W = write * v, and S the state [k, v] before the chunk:
//     A_ij = E_i . (k_j times the decays of (j, i]), j < i;   P_ij = the same of q_i, j <= i;   G = (E, q) times decays up to i
//     (I + A) X = W - G_E S,   O = G_q S + P X,   S <- diag(decays of the chunk) S + (k times the decays behind it)^T X
// Decays between two tokens are products of what lies between, never quotients, so none overflows or loses digits.

constexpr int64_t TOKENS = 64;
constexpr int TILE = VL == 16 ? 4 : 2;  // vectors of columns in a tile of four rows

// acc += a b for four rows of a, with strides of rows and depth, and N vectors of columns of b.
template <int N>
inline __attribute__((always_inline)) void product(vf (&acc)[4][N], const float* a, int64_t row, int64_t step, const float* b,
                                                  int64_t b_row, int64_t depth) {
    for (int64_t d = 0; d < depth; d++, a += step, b += b_row) {
        vf bv[N];
        for (int j = 0; j < N; j++) bv[j] = load(b + j * VL);
        for (int m = 0; m < 4; m++) {
            const vf av = splat(a[m * row]);
            for (int j = 0; j < N; j++) acc[m][j] = av * bv[j] + acc[m][j];
        }
    }
}

// Calls f with the number of vectors and the first column of each tile of n columns.
template <class F> inline __attribute__((always_inline)) void tiles(int64_t n, F f) {
    int64_t col = 0;
    for (; col + TILE * VL <= n; col += TILE * VL) f(std::integral_constant<int, TILE>(), col);
    for (; col < n; col += VL) f(std::integral_constant<int, 1>(), col);
}

// c (+)= a b: rows a multiple of 4, cols of VL; `row` and `step` are the strides of a.
inline void multiply(float* c, int64_t c_row, const float* a, int64_t row, int64_t step, const float* b, int64_t b_row, int64_t rows,
                     int64_t cols, int64_t depth, bool add) {
    tiles(cols, [&](auto size, int64_t col) {
        constexpr int N = decltype(size)::value;
        for (int64_t m = 0; m < rows; m += 4) {
            vf acc[4][N] = {};
            if (add)
                for (int r = 0; r < 4; r++)
                    for (int j = 0; j < N; j++) acc[r][j] = load(c + (m + r) * c_row + col + j * VL);
            product<N>(acc, a + m * row, row, step, b + col, b_row, depth);
            for (int r = 0; r < 4; r++)
                for (int j = 0; j < N; j++) store(c + (m + r) * c_row + col + j * VL, acc[r][j]);
        }
    });
}

// One head. Matrices of tokens have TOKENS rows, those of two halves (E, then q) twice as many; rows behind the last token
// of a chunk are zeros, and their decays 1.
struct Chunks {
    const Call* c;
    int64_t b, h, kp, vp;
    float scale;
    bool vector;                          // a decay for each channel
    float *left, *k, *kt, *wv, *a;        // [2 T, kp], [T, kp], [kp, T], [T, vp], [T, kp]
    float *since, *until, *grown, *kept;  // decays up to i and behind j; left and k times them
    float *between, *pairs;               // [T, T] decays of (j, i]; A and P, [2 T, T]
    float *x, *out, *state, *row;         // [T, vp] twice, [kp, vp], [T + 1, kp]
    float *z, *dx, *xt, *dpairs;          // (-dY, dO) [2 T, vp], [T, vp], [vp, T], [2 T, T]
    float *dleft, *dkept, *dg, *grad;     // [2 T, kp], [T, kp] twice, [kp, vp]
    float *state_t, *grad_t, *marks;      // [vp, kp] twice, [chunks, kp, vp]

    int64_t at(int64_t t, int64_t heads, int64_t head) const { return (b * c->tokens + t) * heads + head; }
    float* whole() const { return since + (TOKENS - 1) * kp; }
};

int64_t chunks_of(const Call& c) { return (c.tokens + TOKENS - 1) / TOKENS; }

// Lays the matrices out from p on and returns their size in floats; with p null it only counts.
int64_t lay_out(Chunks& x, float* p, bool back) {
    const int64_t kp = x.kp, vp = x.vp, t = TOKENS;
    int64_t used = 0;
    const auto take = [&](float*& f, int64_t n) {
        f = p ? p + used : nullptr;
        used += up(n, 16);
    };
    for (float** f : {&x.left, &x.grown}) take(*f, 2 * t * kp);
    for (float** f : {&x.k, &x.kt, &x.a, &x.since, &x.until, &x.kept}) take(*f, t * kp);
    for (float** f : {&x.wv, &x.x, &x.out}) take(*f, t * vp);
    take(x.row, (t + 1) * kp);
    take(x.between, t * t);
    take(x.pairs, 2 * t * t);
    take(x.state, kp * vp);
    if (!back) return used;
    take(x.z, 2 * t * vp);
    for (float** f : {&x.dx, &x.xt}) take(*f, t * vp);
    take(x.dpairs, 2 * t * t);
    take(x.dleft, 2 * t * kp);
    for (float** f : {&x.dkept, &x.dg}) take(*f, t * kp);
    for (float** f : {&x.grad, &x.state_t, &x.grad_t}) take(*f, kp * vp);
    take(x.marks, chunks_of(*x.c) * kp * vp);
    return used;
}

// Inputs of n tokens from t0 on, and what follows from decays.
void read_chunk(const Chunks& x, int64_t t0, int64_t n) {
    const Call& c = *x.c;
    const int64_t kp = x.kp, vp = x.vp, kh = x.h * c.hk / c.hv;
    for (int64_t t = 0; t < TOKENS; t++) {
        float *e = x.left + t * kp, *q = x.left + (TOKENS + t) * kp, *k = x.k + t * kp, *a = x.a + t * kp;
        if (t >= n) {
            for (float* f : {e, q, k}) std::memset(f, 0, size_t(kp) * 4);
            std::memset(x.wv + t * vp, 0, size_t(vp) * 4);
            for (int64_t i = 0; i < kp; i += VL) store(a + i, splat(1.0f));
            continue;
        }
        const int64_t key = x.at(t0 + t, c.hk, kh) * c.k, at = x.at(t0 + t, c.hv, x.h);
        for (int64_t i = 0; i < kp; i += VL) {
            const vf kv = load_some(c.key + key + i, c.k - i);
            store(k + i, kv);
            store(e + i, gate(c.erase, c.erase_vector, at, c.k, i) * kv);
            store(q + i, load_some(c.q + key + i, c.k - i) * x.scale);
            store(a + i, vexp(gate(c.decay, c.decay_vector, at, c.k, i)));
        }
        for (int64_t i = 0; i < vp; i += VL)
            store(x.wv + t * vp + i, gate(c.write, c.write_vector, at, c.v, i) * load_some(c.value + at * c.v + i, c.v - i));
    }
    for (int64_t i = 0; i < kp; i += VL) {
        vf s = splat(1.0f), u = splat(1.0f);
        for (int64_t t = 0; t < TOKENS; t++) {
            const int64_t at = t * kp + i, half = TOKENS * kp;
            s = s * load(x.a + at);
            store(x.since + at, s);
            store(x.grown + at, load(x.left + at) * s);
            store(x.grown + half + at, load(x.left + half + at) * s);
        }
        for (int64_t t = TOKENS; t-- > 0;) {
            const int64_t at = t * kp + i;
            store(x.until + at, u);
            store(x.kept + at, load(x.k + at) * u);
            u = u * load(x.a + at);
        }
    }
}

// A and P where the decay is one number: products of E, q and k, times `between`.
void pairs_of_scalars(const Chunks& x, int64_t m) {
    transpose_words(x.k, x.kp, x.kt, TOKENS, TOKENS, x.kp);
    float d[TOKENS] = {};
    for (int64_t i = 0; i < m; i++) {
        const vf step = splat(x.a[i * x.kp]);
        for (int64_t j = 0; j < TOKENS; j += VL) store(d + j, load(d + j) * step);
        d[i] = 1.0f;
        std::memcpy(x.between + i * TOKENS, d, sizeof d);
    }
    for (int half = 0; half < 2; half++)
        for (int64_t i = 0; i < m; i += 4) {
            float* to = x.pairs + (half * TOKENS + i) * TOKENS;
            multiply(to, TOKENS, x.left + (half * TOKENS + i) * x.kp, x.kp, 1, x.kt, TOKENS, 4, up(i + 4, VL), x.kp, false);
            for (int64_t r = 0; r < 4; r++)
                for (int64_t j = 0; j < TOKENS; j += VL) {
                    const vf d = load(x.between + (i + r) * TOKENS + j);
                    store(to + r * TOKENS + j, j < i + 4 ? load(to + r * TOKENS + j) * d : vf{});
                }
            if (half == 0)
                for (int64_t r = 0; r < 4; r++) to[r * TOKENS + i + r] = 0.0f;
        }
}

// The same where it is a vector: k_j is carried from token to token, decayed by each.
void pairs_of_vectors(const Chunks& x, int64_t m) {
    const int64_t kp = x.kp;
    std::memset(x.pairs, 0, size_t(2 * TOKENS * TOKENS) * 4);
    for (int64_t j = 0; j < m; j++) {
        std::memcpy(x.row, x.k + j * kp, size_t(kp) * 4);
        for (int64_t i = j; i < m; i++) {
            const float *e = x.left + i * kp, *q = x.left + (TOKENS + i) * kp, *a = x.a + i * kp;
            vf of_e = {}, of_q = {};
            for (int64_t d = 0; d < kp; d += VL) {
                vf w = load(x.row + d);
                if (i > j) store(x.row + d, w = w * load(a + d));
                of_e = load(e + d) * w + of_e;
                of_q = load(q + d) * w + of_q;
            }
            if (i > j) x.pairs[i * TOKENS + j] = sum(of_e);
            x.pairs[(TOKENS + i) * TOKENS + j] = sum(of_q);
        }
    }
}

// X, by forward substitution four rows at a time.
void solve(const Chunks& x, int64_t m) {
    const int64_t vp = x.vp;
    multiply(x.x, vp, x.grown, x.kp, 1, x.state, vp, m, vp, x.kp, false);
    tiles(vp, [&](auto size, int64_t col) {
        constexpr int N = decltype(size)::value;
        for (int64_t i = 0; i < m; i += 4) {
            const float* a = x.pairs + i * TOKENS;
            vf y[4][N] = {};
            product<N>(y, a, TOKENS, 1, x.x + col, vp, i);
            for (int r = 0; r < 4; r++)
                for (int j = 0; j < N; j++) {
                    const int64_t at = (i + r) * vp + col + j * VL;
                    vf s = load(x.wv + at) - load(x.x + at) - y[r][j];
                    for (int p = 0; p < r; p++) s = s - y[p][j] * a[r * TOKENS + i + p];
                    y[r][j] = s;
                    store(x.x + at, s);
                }
        }
    });
}

// Rows of a state [kp, vp] times the decays of the whole chunk.
void decay_rows(const Chunks& x, float* state) {
    for (int64_t i = 0; i < x.kp; i++)
        for (int64_t j = 0; j < x.vp; j += VL) store(state + i * x.vp + j, load(state + i * x.vp + j) * x.whole()[i]);
}

// What both directions need of a chunk: all up to X.
void enter_chunk(const Chunks& x, int64_t t0, int64_t n, int64_t m) {
    read_chunk(x, t0, n);
    if (x.vector) pairs_of_vectors(x, m);
    else pairs_of_scalars(x, m);
    solve(x, m);
}

void leave_chunk(const Chunks& x, int64_t m) {
    decay_rows(x, x.state);
    multiply(x.state, x.vp, x.kept, 1, x.kp, x.x, x.vp, x.kp, x.vp, m, true);
}

void copy_state(const Chunks& x, const float* from, float* to) {
    const Call& c = *x.c;
    std::memset(to, 0, size_t(x.kp * x.vp) * 4);
    if (!from) return;
    from += (x.b * c.hv + x.h) * c.v * c.k;
    for (int64_t v = 0; v < c.v; v++)
        for (int64_t k = 0; k < c.k; k++) to[k * x.vp + v] = from[v * c.k + k];
}
void keep_state(const Chunks& x, const float* from, float* to) {
    const Call& c = *x.c;
    to += (x.b * c.hv + x.h) * c.v * c.k;
    for (int64_t v = 0; v < c.v; v++)
        for (int64_t k = 0; k < c.k; k++) to[v * c.k + k] = from[k * x.vp + v];
}

void forward(const Chunks& x) {
    const Call& c = *x.c;
    copy_state(x, c.initial, x.state);
    for (int64_t t0 = 0; t0 < c.tokens; t0 += TOKENS) {
        const int64_t n = c.tokens - t0 < TOKENS ? c.tokens - t0 : TOKENS, m = up(n, 4);
        enter_chunk(x, t0, n, m);
        multiply(x.out, x.vp, x.grown + TOKENS * x.kp, x.kp, 1, x.state, x.vp, m, x.vp, x.kp, false);
        for (int64_t i = 0; i < m; i += 4)
            multiply(x.out + i * x.vp, x.vp, x.pairs + (TOKENS + i) * TOKENS, TOKENS, 1, x.x, x.vp, 4, x.vp, i + 4, true);
        for (int64_t t = 0; t < n; t++)
            std::memcpy(c.out + x.at(t0 + t, c.hv, x.h) * c.v, x.out + t * x.vp, size_t(c.v) * 4);
        leave_chunk(x, m);
    }
    keep_state(x, x.state, c.final);
}
