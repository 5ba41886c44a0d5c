// Gradients of the gated delta rule in chunks; included by gdn_rule.cpp after gdn_rule_chunk.h, whose names it uses.
// With dO and dS' the gradients of a chunk's outputs and of the state after it, and K' = k times the decays behind it:
//     dX = P^T dO + K' dS',  dW = dY = (I + A)^-T dX,  Z = (-dY, dO)
//     d(A, P) = Z X^T,  dG = Z S^T,  dK' = X dS'^T,  dS = diag(decays of the chunk) dS' + G^T Z
// The states before each chunk are kept; all else is computed again.

// dX, then -dY into the first half of z by back substitution, four rows at a time.
void solve_back(const Chunks& x, int64_t m) {
    const int64_t vp = x.vp, half = TOKENS * TOKENS;
    const float* dout = x.z + TOKENS * vp;
    multiply(x.dx, vp, x.kept, x.kp, 1, x.grad, vp, m, vp, x.kp, false);
    for (int64_t i = 0; i < m; i += 4)  // tokens from i on read X_i
        multiply(x.dx + i * vp, vp, x.pairs + half + i * TOKENS + i, 1, TOKENS, dout + i * vp, vp, 4, vp, m - i, true);
    tiles(vp, [&](auto size, int64_t col) {
        constexpr int N = decltype(size)::value;
        for (int64_t i = m - 4; i >= 0; i -= 4) {
            vf y[4][N] = {};
            product<N>(y, x.pairs + (i + 4) * TOKENS + i, 1, TOKENS, x.z + (i + 4) * vp + col, vp, m - i - 4);
            for (int r = 4; r-- > 0;)
                for (int j = 0; j < N; j++) {
                    const int64_t at = (i + r) * vp + col + j * VL;
                    vf s = -load(x.dx + at) - y[r][j];
                    for (int p = r + 1; p < 4; p++) s = s - y[p][j] * x.pairs[(i + p) * TOKENS + i + r];
                    y[r][j] = s;
                    store(x.z + at, s);
                }
        }
    });
}

// From gradients of A and P to those of E, q and k, and of each decay between j and i.
void pairs_of_scalars_back(const Chunks& x, int64_t m) {
    const int64_t kp = x.kp;
    for (int64_t i = 0; i < m; i++) {
        float before = 0.0f;  // of pairs (i, j), j < t
        for (int64_t t = 0; t < i; t++) {
            const int64_t a = i * TOKENS + t, p = a + TOKENS * TOKENS;
            before += x.dpairs[a] * x.pairs[a] + x.dpairs[p] * x.pairs[p];
            x.dg[(t + 1) * kp] += before;
        }
        for (int half = 0; half < 2; half++) {
            float* d = x.dpairs + (half * TOKENS + i) * TOKENS;
            for (int64_t j = 0; j < TOKENS; j += VL) store(d + j, load(d + j) * load(x.between + i * TOKENS + j));
            if (half == 0) d[i] = 0.0f;
        }
    }
    for (int half = 0; half < 2; half++) {
        const float *d = x.dpairs + half * TOKENS * TOKENS, *left = x.left + half * TOKENS * kp;
        for (int64_t i = 0; i < m; i += 4) {
            float* to = x.dleft + (half * TOKENS + i) * kp;
            multiply(to, kp, d + i * TOKENS, TOKENS, 1, x.k, kp, 4, kp, i + 4, true);
            multiply(x.dkept + i * kp, kp, d + i * TOKENS + i, 1, TOKENS, left + i * kp, kp, 4, kp, m - i, true);
        }
    }
}

// The same for a vector. `row` holds k_j decayed up to each token; on the way back a sum of the gradients behind.
void pairs_of_vectors_back(const Chunks& x, int64_t m) {
    const int64_t kp = x.kp, half = TOKENS * kp;
    for (int64_t j = 0; j < m; j++) {
        std::memcpy(x.row + j * kp, x.k + j * kp, size_t(kp) * 4);
        for (int64_t i = j; i < m; i++) {
            const float da = i > j ? x.dpairs[i * TOKENS + j] : 0.0f, dp = x.dpairs[(TOKENS + i) * TOKENS + j];
            float *w = x.row + i * kp, *e = x.dleft + i * kp;
            for (int64_t d = 0; d < kp; d += VL) {
                if (i > j) store(w + d, load(w + d - kp) * load(x.a + i * kp + d));
                store(e + d, load(e + d) + da * load(w + d));
                store(e + half + d, load(e + half + d) + dp * load(w + d));
            }
        }
        for (int64_t d = 0; d < kp; d += VL) {
            vf behind = {};  // of pairs (i, j), i >= t, decayed from t - 1 to i
            for (int64_t t = m; --t > j;) {
                const int64_t at = t * kp + d;
                behind = behind + x.dpairs[t * TOKENS + j] * load(x.left + at);
                behind = (behind + x.dpairs[(TOKENS + t) * TOKENS + j] * load(x.left + half + at)) * load(x.a + at);
                store(x.dg + at, load(x.dg + at) + behind * load(x.row + at - kp));
            }
            behind = behind + x.dpairs[(TOKENS + j) * TOKENS + j] * load(x.left + half + j * kp + d);
            store(x.dkept + j * kp + d, load(x.dkept + j * kp + d) + behind);
        }
    }
}

// Gradients of `grown`, `kept` and the decays of the whole chunk to those of left (in place), k (in place) and each decay.
void scales_back(const Chunks& x) {
    const int64_t kp = x.kp, vp = x.vp, half = TOKENS * kp;
    for (int64_t i = 0; i < kp; i += VL) {
        float whole[VL];
        for (int64_t j = 0; j < VL; j++) {
            vf s = {};
            for (int64_t v = 0; v < vp; v += VL) s = load(x.grad + (i + j) * vp + v) * load(x.state + (i + j) * vp + v) + s;
            whole[j] = sum(s) * x.whole()[i + j];
        }
        const vf all = load(whole);
        vf before = {}, behind = {};
        for (int64_t t = 0; t < TOKENS; t++) {  // a decay at t is part of what is behind each token before it
            const int64_t at = t * kp + i;
            store(x.dg + at, all + before);
            before = before + load(x.dkept + at) * load(x.kept + at);
            store(x.dkept + at, load(x.dkept + at) * load(x.until + at));
        }
        for (int64_t t = TOKENS; t-- > 0;) {  // and of what lies up to it and each token after it
            const int64_t at = t * kp + i;
            behind = behind + load(x.dleft + at) * load(x.grown + at) + load(x.dleft + half + at) * load(x.grown + half + at);
            store(x.dg + at, load(x.dg + at) + behind);
            store(x.dleft + at, load(x.dleft + at) * load(x.since + at));
            store(x.dleft + half + at, load(x.dleft + half + at) * load(x.since + at));
        }
    }
}

void chunk_back(const Chunks& x, int64_t t0, int64_t n) {
    const Call& c = *x.c;
    const int64_t kp = x.kp, vp = x.vp, m = up(n, 4), w = up(n, VL);
    enter_chunk(x, t0, n, m);
    float* dout = x.z + TOKENS * vp;
    std::memset(x.z, 0, size_t(2 * TOKENS * vp) * 4);
    for (int64_t t = 0; t < n; t++)
        std::memcpy(dout + t * vp, c.grad_out + x.at(t0 + t, c.hv, x.h) * c.v, size_t(c.v) * 4);
    solve_back(x, m);
    for (int64_t t = m; t < w; t++) std::memset(x.x + t * vp, 0, size_t(vp) * 4);
    transpose_words(x.x, vp, x.xt, TOKENS, w, vp);
    transpose_words(x.state, vp, x.state_t, kp, kp, vp);
    transpose_words(x.grad, vp, x.grad_t, kp, kp, vp);
    std::memset(x.dleft, 0, size_t(2 * TOKENS * kp) * 4);
    std::memset(x.dkept, 0, size_t(TOKENS * kp) * 4);
    multiply(x.dkept, kp, x.x, vp, 1, x.grad_t, kp, m, kp, vp, false);
    for (int64_t half = 0; half < 2 * TOKENS; half += TOKENS) {
        multiply(x.dleft + half * kp, kp, x.z + half * vp, vp, 1, x.state_t, kp, m, kp, vp, false);
        for (int64_t i = half; i < half + m; i += 4)
            multiply(x.dpairs + i * TOKENS, TOKENS, x.z + i * vp, vp, 1, x.xt, TOKENS, 4, up(i - half + 4, VL), vp, false);
    }
    scales_back(x);
    if (x.vector) pairs_of_vectors_back(x, m);
    else pairs_of_scalars_back(x, m);
    for (int64_t i = 0; i < n * vp; i += VL) store(x.dx + i, -load(x.z + i));
    for (int64_t t = 0; t < n; t++)
        put_gradients(c, x.b, x.h, t0 + t, x.scale, x.dleft + (TOKENS + t) * kp, x.dkept + t * kp, x.dleft + t * kp, x.dg + t * kp,
                      x.dx + t * vp);
    decay_rows(x, x.grad);
    multiply(x.grad, vp, x.grown, 1, kp, x.z, vp, kp, vp, m, true);
    multiply(x.grad, vp, x.grown + TOKENS * kp, 1, kp, dout, vp, kp, vp, m, true);
}

void backward(Chunks& x) {
    const Call& c = *x.c;
    const int64_t size = x.kp * x.vp, chunks = chunks_of(c);
    copy_state(x, c.initial, x.marks);
    float* state = x.state;
    for (int64_t i = 0; i + 1 < chunks; i++) {
        x.state = x.marks + i * size;
        enter_chunk(x, i * TOKENS, TOKENS, TOKENS);
        std::memcpy(x.state + size, x.state, size_t(size) * 4);
        x.state += size;
        leave_chunk(x, TOKENS);
    }
    copy_state(x, c.grad_final, x.grad);
    for (int64_t i = chunks; i-- > 0;) {
        const int64_t left = c.tokens - i * TOKENS;
        x.state = x.marks + i * size;
        chunk_back(x, i * TOKENS, left < TOKENS ? left : TOKENS);
    }
    x.state = state;
    keep_state(x, x.grad, c.dinitial);
}
