// The recurrence token by token, on blocks of VL rows of the state, which stay in the first-level cache for all tokens.

// A row of the state as float, from or to the cache's dtype.
template <class T> static inline void row_in(const T* from, int64_t k, float* to, int64_t kp) {
    for (int64_t i = 0; i < kp; i += VL) store(to + i, load_some(from + i, k - i));
}
template <class T> static inline void row_out(T* to, int64_t k, const float* from) {
    for (int64_t i = 0; i < k; i += VL) store_some(to + i, load(from + i), k - i);
}
static inline void load_row(const Call& c, int64_t slot, int64_t head, int64_t v, float* to, int64_t kp) {
    const int64_t at = slot * c.ssm_slot + (head * c.v + v) * c.k;
    if (c.state == gdn::F32) row_in(reinterpret_cast<const float*>(c.ssm_state) + at, c.k, to, kp);
    else if (c.state == gdn::BF16_) row_in(reinterpret_cast<const BF16*>(c.ssm_state) + at, c.k, to, kp);
    else row_in(reinterpret_cast<const FP16*>(c.ssm_state) + at, c.k, to, kp);
}
static inline void store_row(const Call& c, int64_t slot, int64_t head, int64_t v, const float* from) {
    const int64_t at = slot * c.ssm_slot + (head * c.v + v) * c.k;
    if (c.state == gdn::F32) row_out(reinterpret_cast<float*>(c.ssm_state) + at, c.k, from);
    else if (c.state == gdn::BF16_) row_out(reinterpret_cast<BF16*>(c.ssm_state) + at, c.k, from);
    else row_out(reinterpret_cast<FP16*>(c.ssm_state) + at, c.k, from);
}

static int64_t step_bytes(const Call& c) {
    return 4 * (c.hv / c.hk) * up(c.v, VL) * up(c.k, VL) + 4 * VL * up(c.k, VL) + 256;
}

constexpr int ROWS = VL == 16 ? 4 : 2;  // rows that share each load of k and q

// The block of VL rows that comes two blocks after this one. Asked for in one go, its lines would wait for each other; so
// both sweeps over this block ask for a half, a few bytes at each step.
constexpr int64_t BLOCKS_AHEAD = 2;
struct Soon {
    const char* at;
    int64_t step;
    inline void some() {
        for (int64_t i = 0; i < step; i += 64) ask(at + i);
        at += step;
    }
};

// r = S k and p = S q for VL rows.
static inline void dots(float* const* rows, const float* k, const float* q, int64_t kp, Soon& soon, vf* r, vf* p) {
    vf rs[VL], ps[VL];
    for (int m = 0; m < VL; m += ROWS) {
        vf a[ROWS] = {}, b[ROWS] = {};
        for (int64_t i = 0; i < kp; i += VL) {
            const vf kv = load(k + i), qv = load(q + i);
            soon.some();
            for (int j = 0; j < ROWS; j++) {
                const vf s = load(rows[m + j] + i);
                a[j] = s * kv + a[j];
                b[j] = s * qv + b[j];
            }
        }
        for (int j = 0; j < ROWS; j++) {
            rs[m + j] = a[j];
            ps[m + j] = b[j];
        }
    }
    *r = row_sums(rs);
    *p = row_sums(ps);
}

// S <- alpha S + d k^T for VL rows; the same sweep takes the next token's r and p when there is one.
template <bool NEXT> static inline void update(float* const* rows, float alpha, vf d, const float* k, const float* next_k,
                                               const float* next_q, int64_t kp, Soon& soon, vf* r, vf* p) {
    vf rs[VL], ps[VL];
    float ds[VL];
    store(ds, d);
    for (int m = 0; m < VL; m += ROWS) {
        vf a[ROWS] = {}, b[ROWS] = {};
        for (int64_t i = 0; i < kp; i += VL) {
            const vf kv = load(k + i);
            if (!NEXT) soon.some();
            vf nk, nq;
            if (NEXT) {
                nk = load(next_k + i);
                nq = load(next_q + i);
            }
            for (int j = 0; j < ROWS; j++) {
                const vf s = load(rows[m + j] + i) * alpha + ds[m + j] * kv;
                store(rows[m + j] + i, s);
                if (NEXT) {
                    a[j] = s * nk + a[j];
                    b[j] = s * nq + b[j];
                }
            }
        }
        if (NEXT)
            for (int j = 0; j < ROWS; j++) {
                rs[m + j] = a[j];
                ps[m + j] = b[j];
            }
    }
    if (NEXT) {
        *r = row_sums(rs);
        *p = row_sums(ps);
    }
}

template <class IO> static void put_out(const Unit& u, int64_t head, int64_t t0, int64_t n, const float* out) {
    const Call& c = *u.c;
    for (int64_t t = 0; t < n; t++) {
        IO* to = reinterpret_cast<IO*>(c.core) + u.row(t0 + t) * c.core_row + head * c.v;
        for (int64_t i = 0; i < c.v; i += VL) store_some(to + i, load(out + t * u.vp + i), c.v - i);
    }
}

static void normalise(float* x, int64_t n, int64_t kp, const float* scale) {
    for (int64_t t = 0; t < n; t++, x += kp)
        for (int64_t i = 0; i < kp; i += VL) store(x + i, load(x + i) * scale[t]);
}

template <class IO> static void run_steps(const Unit& u, Arena& arena) {
    const Call& c = *u.c;
    const Sequence& s = *u.s;
    float* states = arena.take<float>(u.ratio * u.vp * u.kp);
    float* spare = arena.take<float>(VL * u.kp);
    // One token that continues its own float32 slot works in the cache itself: each number is read and written once.
    const bool in_place = s.count == 1 && c.state == gdn::F32 && c.k % VL == 0 && s.source >= 0 && s.source == s.final &&
                          s.writes == s.writes_end;
    for (int64_t t0 = 0; t0 < s.count; t0 += CHUNK) {
        const int64_t n = s.count - t0 < CHUNK ? s.count - t0 : CHUNK;
        prepare<IO>(u, t0, n);
        normalise(u.q, n, u.kp, u.q_scale);
        normalise(u.k, n, u.kp, u.k_scale);
        if (t0 + n == s.count) {
            expect_unit(*u.work, u.next);
            expect_rows(*u.work, u.next);
        }
        for (int64_t t = 0; t < n; t++) {
            vf d = {};
            for (int64_t i = 0; i < u.kp; i += VL) d = load(u.k + t * u.kp + i) * load(u.q + t * u.kp + i) + d;
            u.kq[t] = sum(d);
        }
        for (int64_t h = 0; h < u.ratio; h++) {
            const int64_t head = u.group * u.ratio + h;
            for (int64_t v0 = 0; v0 < c.v; v0 += VL) {
                float* rows[VL];
                for (int64_t j = 0; j < VL; j++) {
                    if (in_place && v0 + j < c.v) {
                        rows[j] = reinterpret_cast<float*>(c.ssm_state) + s.source * c.ssm_slot + (head * c.v + v0 + j) * c.k;
                        continue;
                    }
                    // Only a sequence that comes back for more tokens needs room for every row.
                    const bool again = s.count > CHUNK && v0 + j < c.v;
                    rows[j] = again ? states + (h * u.vp + v0 + j) * u.kp : spare + j * u.kp;
                    if (t0 > 0 && v0 + j < c.v) continue;
                    if (v0 + j < c.v && s.source >= 0) load_row(c, s.source, head, v0 + j, rows[j], u.kp);
                    else std::memset(rows[j], 0, size_t(u.kp) * 4);
                }
                const int64_t item = int64_t(gdn::size_of(c.state));
                const int64_t later = s.source * c.ssm_slot + (head * c.v + v0 + BLOCKS_AHEAD * VL) * c.k;
                Soon soon{c.ssm_state + later * item, t0 > 0 || s.source < 0 ? 0 : VL * ROWS * item / 2};
                vf r, p;
                dots(rows, u.k, u.q, u.kp, soon, &r, &p);
                int64_t write = s.writes;
                while (write < s.writes_end && u.work->writes[write].token < t0) write++;
                for (int64_t t = 0; t < n; t++) {
                    const float alpha = u.alpha[h * CHUNK + t];
                    const vf d = u.beta[h * CHUNK + t] * (load(u.v + (h * CHUNK + t) * u.vp + v0) - alpha * r);
                    store(u.out + t * u.vp + v0, alpha * p + u.kq[t] * d);
                    const float* k = u.k + t * u.kp;
                    if (t + 1 < n) update<true>(rows, alpha, d, k, k + u.kp, u.q + (t + 1) * u.kp, u.kp, soon, &r, &p);
                    else update<false>(rows, alpha, d, k, k, k, u.kp, soon, &r, &p);
                    for (; write < s.writes_end && u.work->writes[write].token == t0 + t; write++)
                        for (int64_t j = 0; j < VL && v0 + j < c.v; j++)
                            store_row(c, u.work->writes[write].slot, head, v0 + j, rows[j]);
                }
                if (!in_place && s.final >= 0 && t0 + n == s.count)
                    for (int64_t j = 0; j < VL && v0 + j < c.v; j++) store_row(c, s.final, head, v0 + j, rows[j]);
            }
            put_out<IO>(u, head, t0, n, u.out);
        }
    }
    for (int64_t w = s.writes; w < s.writes_end; w++) keep_inputs<IO>(u, u.work->writes[w].token, u.work->writes[w].slot);
    if (s.final >= 0) keep_inputs<IO>(u, s.count - 1, s.final);
}
