// The gated delta rule and its gradients on one instruction set, everything in float. Built once per instruction set.
// One head at a time; inside a head rows of the state [v, k] do not meet, so blocks of VL rows go through a whole chunk of
// tokens in the cache. Going back, the states inside a chunk are computed again from the one at its beginning.
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>

namespace {
#include "gdn_vec.h"

constexpr int64_t CHUNK = 32;

// Every field has 8 bytes, in the order in which gdn_rule.py packs them. Tensors are dense; gates have one number per head
// or one per channel, and so have their gradients. Those of q and k are per value head.
struct Call {
    int64_t batch, tokens, hk, hv, k, v, decay_vector, erase_vector, write_vector, scale_bits, threads, chunked;
    const float *q, *key, *value, *decay, *erase, *write, *initial;
    float *out, *final;
    const float *grad_out, *grad_final;
    float *dq, *dk, *dv, *ddecay, *derase, *dwrite, *dinitial;
};

int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

struct Head {
    const Call* c;
    int64_t b, h, kp, vp;
    float scale;
    float *q, *k, *ek, *a, *aek;  // [CHUNK + 1, kp]: q, k, erase * k, exp(decay), and the product of the last two
    float *wv, *out;              // [CHUNK, vp]
    float* state;                 // [vp, kp]
    float *grad, *dout, *u, *du;  // [vp, kp], [CHUNK, vp] three times
    float *dq, *dk, *de, *dg;     // [CHUNK, kp]
    float *past, *marks;          // [CHUNK + 1, VL, kp], [chunks, vp, kp]

    int64_t at(int64_t t, int64_t heads, int64_t head) const { return (b * c->tokens + t) * heads + head; }
};

int64_t floats(const Call& c, bool back) {
    const int64_t kp = up(c.k, VL), vp = up(c.v, VL), chunks = (c.tokens + CHUNK - 1) / CHUNK;
    int64_t n = 5 * (CHUNK + 1) * kp + 2 * CHUNK * vp + vp * kp;
    if (back) n += vp * kp + 3 * CHUNK * vp + 4 * CHUNK * kp + (CHUNK + 1) * VL * kp + chunks * vp * kp;
    return n + 16 * 32;
}

void carve(Head& x, float* p, bool back) {
    const int64_t chunks = (x.c->tokens + CHUNK - 1) / CHUNK;
    const auto take = [&](int64_t n) {
        float* r = p;
        p += up(n, 16);
        return r;
    };
    for (float** f : {&x.q, &x.k, &x.ek, &x.a, &x.aek}) *f = take((CHUNK + 1) * x.kp);
    for (float** f : {&x.wv, &x.out}) *f = take(CHUNK * x.vp);
    x.state = take(x.vp * x.kp);
    if (!back) return;
    x.grad = take(x.vp * x.kp);
    for (float** f : {&x.dout, &x.u, &x.du}) *f = take(CHUNK * x.vp);
    for (float** f : {&x.dq, &x.dk, &x.de, &x.dg}) *f = take(CHUNK * x.kp);
    x.past = take((CHUNK + 1) * VL * x.kp);
    x.marks = take(chunks * x.vp * x.kp);
}

vf gate(const float* p, bool vector, int64_t at, int64_t size, int64_t i) {
    return vector ? load_some(p + at * size + i, size - i) : splat(p[at]);
}

// Gradients of one token: of q as it enters the sums, of k without and of erase * k, of the decay by channel, of write * v.
void put_gradients(const Call& c, int64_t b, int64_t h, int64_t t, float scale, const float* dq, const float* dk, const float* de,
                   const float* dg, const float* dwv) {
    const int64_t at = (b * c.tokens + t) * c.hv + h, key = ((b * c.tokens + t) * c.hk + h * c.hk / c.hv) * c.k;
    vf decay = {}, erase = {}, write = {};
    for (int64_t i = 0; i < c.k; i += VL) {
        const int64_t left = c.k - i;
        const vf d = load(de + i), of_erase = d * load_some(c.key + key + i, left);
        store_some(c.dq + at * c.k + i, load(dq + i) * scale, left);
        store_some(c.dk + at * c.k + i, load(dk + i) + d * gate(c.erase, c.erase_vector, at, c.k, i), left);
        if (c.erase_vector) store_some(c.derase + at * c.k + i, of_erase, left);
        if (c.decay_vector) store_some(c.ddecay + at * c.k + i, load(dg + i), left);
        erase = erase + of_erase;
        decay = decay + load(dg + i);
    }
    for (int64_t i = 0; i < c.v; i += VL) {
        const int64_t left = c.v - i;
        const vf d = load(dwv + i), of_write = d * load_some(c.value + at * c.v + i, left);
        store_some(c.dv + at * c.v + i, d * gate(c.write, c.write_vector, at, c.v, i), left);
        if (c.write_vector) store_some(c.dwrite + at * c.v + i, of_write, left);
        write = write + of_write;
    }
    if (!c.erase_vector) c.derase[at] = sum(erase);
    if (!c.decay_vector) c.ddecay[at] = sum(decay);
    if (!c.write_vector) c.dwrite[at] = sum(write);
}

#include "gdn_rule_chunk.h"
#include "gdn_rule_back.h"

// Inputs of tokens t0 .. t0 + n - 1; the row after the last is zero, what the look-ahead of the last token reads.
void prepare(const Head& x, int64_t t0, int64_t n) {
    const Call& c = *x.c;
    const int64_t kh = x.h * c.hk / c.hv;
    for (int64_t t = 0; t < n; t++) {
        const int64_t key = x.at(t0 + t, c.hk, kh) * c.k, at = x.at(t0 + t, c.hv, x.h);
        for (int64_t i = 0; i < x.kp; i += VL) {
            const vf k = load_some(c.key + key + i, c.k - i), a = vexp(gate(c.decay, c.decay_vector, at, c.k, i));
            const vf ek = gate(c.erase, c.erase_vector, at, c.k, i) * k;
            store(x.q + t * x.kp + i, load_some(c.q + key + i, c.k - i));
            store(x.k + t * x.kp + i, k);
            store(x.ek + t * x.kp + i, ek);
            store(x.a + t * x.kp + i, a);
            store(x.aek + t * x.kp + i, a * ek);
        }
        for (int64_t i = 0; i < x.vp; i += VL)
            store(x.wv + t * x.vp + i, gate(c.write, c.write_vector, at, c.v, i) * load_some(c.value + at * c.v + i, c.v - i));
    }
    std::memset(x.aek + n * x.kp, 0, size_t(x.kp) * 4);
}

// VL rows of the state through n tokens; `past` (if any) gets the states before each token and after the last,
// `u` and `out` (if any) the deltas and outputs.
void forward_rows(const Head& x, float* s, int64_t v0, int64_t n, float* past, float* u, float* out) {
    const int64_t kp = x.kp;
    vf parts[VL], more[VL];
    for (int j = 0; j < VL; j++) {
        vf r = {};
        for (int64_t i = 0; i < kp; i += VL) r = load(s + j * kp + i) * load(x.aek + i) + r;
        parts[j] = r;
    }
    vf r = row_sums(parts);
    if (past) std::memcpy(past, s, size_t(VL * kp) * 4);
    for (int64_t t = 0; t < n; t++) {
        const vf d = load(x.wv + t * x.vp + v0) - r;
        float ds[VL];
        store(ds, d);
        if (u) store(u + t * x.vp + v0, d);
        const float *k = x.k + t * kp, *q = x.q + t * kp, *a = x.a + t * kp, *next = x.aek + (t + 1) * kp;
        for (int j = 0; j < VL; j++) {
            vf o = {}, e = {};
            for (int64_t i = 0; i < kp; i += VL) {
                const vf w = load(s + j * kp + i) * load(a + i) + ds[j] * load(k + i);
                store(s + j * kp + i, w);
                o = w * load(q + i) + o;
                e = w * load(next + i) + e;
            }
            parts[j] = o;
            more[j] = e;
        }
        if (past) std::memcpy(past + (t + 1) * VL * kp, s, size_t(VL * kp) * 4);
        if (out) store(out + t * x.vp + v0, row_sums(parts) * x.scale);
        r = row_sums(more);
    }
}

void load_state(const Head& x, const float* from, float* to) {
    const Call& c = *x.c;
    std::memset(to, 0, size_t(x.vp * x.kp) * 4);
    if (!from) return;
    for (int64_t v = 0; v < c.v; v++)
        std::memcpy(to + v * x.kp, from + ((x.b * c.hv + x.h) * c.v + v) * c.k, size_t(c.k) * 4);
}
void save_state(const Head& x, const float* from, float* to) {
    const Call& c = *x.c;
    for (int64_t v = 0; v < c.v; v++)
        std::memcpy(to + ((x.b * c.hv + x.h) * c.v + v) * c.k, from + v * x.kp, size_t(c.k) * 4);
}

void forward(const Head& x) {
    const Call& c = *x.c;
    load_state(x, c.initial, x.state);
    for (int64_t t0 = 0; t0 < c.tokens; t0 += CHUNK) {
        const int64_t n = c.tokens - t0 < CHUNK ? c.tokens - t0 : CHUNK;
        prepare(x, t0, n);
        for (int64_t v = 0; v < x.vp; v += VL) forward_rows(x, x.state + v * x.kp, v, n, nullptr, nullptr, x.out);
        for (int64_t t = 0; t < n; t++)
            std::memcpy(c.out + x.at(t0 + t, c.hv, x.h) * c.v, x.out + t * x.vp, size_t(c.v) * 4);
    }
    save_state(x, x.state, c.final);
}

void backward_rows(const Head& x, int64_t v0, int64_t n) {
    const int64_t kp = x.kp;
    float* grad = x.grad + v0 * kp;
    for (int64_t t = n; t-- > 0;) {
        const float *k = x.k + t * kp, *q = x.q + t * kp, *ek = x.ek + t * kp, *a = x.a + t * kp;
        const float *before = x.past + t * VL * kp, *after = before + VL * kp;
        float douts[VL], us[VL], dus[VL];
        store(douts, load(x.dout + t * x.vp + v0) * x.scale);
        store(us, load(x.u + t * x.vp + v0));
        vf parts[VL] = {};
        for (int64_t i = 0; i < kp; i += VL) {
            const vf kv = load(k + i), qv = load(q + i);
            vf dq = load(x.dq + t * kp + i), dk = load(x.dk + t * kp + i);
            for (int j = 0; j < VL; j++) {
                const vf g = load(grad + j * kp + i) + douts[j] * qv;
                store(grad + j * kp + i, g);
                dq = douts[j] * load(after + j * kp + i) + dq;
                dk = us[j] * g + dk;
                parts[j] = g * kv + parts[j];
            }
            store(x.dq + t * kp + i, dq);
            store(x.dk + t * kp + i, dk);
        }
        const vf du = row_sums(parts);
        store(dus, du);
        store(x.du + t * x.vp + v0, du);
        for (int64_t i = 0; i < kp; i += VL) {
            const vf ekv = load(ek + i), av = load(a + i);
            vf de = {}, dg = {};
            for (int j = 0; j < VL; j++) {
                const vf s = load(before + j * kp + i), g = load(grad + j * kp + i) - dus[j] * ekv;
                de = dus[j] * s + de;
                dg = g * s + dg;
                store(grad + j * kp + i, g * av);
            }
            store(x.de + t * kp + i, load(x.de + t * kp + i) - de * av);
            store(x.dg + t * kp + i, load(x.dg + t * kp + i) + dg * av);
        }
    }
}

void backward(const Head& x) {
    const Call& c = *x.c;
    const size_t state = size_t(x.vp * x.kp);
    load_state(x, c.initial, x.state);
    const int64_t chunks = (c.tokens + CHUNK - 1) / CHUNK;
    for (int64_t i = 0; i < chunks; i++) {
        const int64_t t0 = i * CHUNK, n = c.tokens - t0 < CHUNK ? c.tokens - t0 : CHUNK;
        std::memcpy(x.marks + size_t(i) * state, x.state, state * 4);
        if (i + 1 == chunks) break;
        prepare(x, t0, n);
        for (int64_t v = 0; v < x.vp; v += VL) forward_rows(x, x.state + v * x.kp, v, n, nullptr, nullptr, nullptr);
    }
    load_state(x, c.grad_final, x.grad);
    for (int64_t i = chunks; i-- > 0;) {
        const int64_t t0 = i * CHUNK, n = c.tokens - t0 < CHUNK ? c.tokens - t0 : CHUNK;
        prepare(x, t0, n);
        for (int64_t t = 0; t < n; t++)
            for (int64_t v = 0; v < x.vp; v += VL)
                store(x.dout + t * x.vp + v, load_some(c.grad_out + x.at(t0 + t, c.hv, x.h) * c.v + v, c.v > v ? c.v - v : 0));
        for (float* f : {x.dq, x.dk, x.de, x.dg}) std::memset(f, 0, size_t(CHUNK * x.kp) * 4);
        for (int64_t v = 0; v < x.vp; v += VL) {
            forward_rows(x, x.marks + size_t(i) * state + v * x.kp, v, n, x.past, x.u, nullptr);
            backward_rows(x, v, n);
        }
        for (int64_t t = 0; t < n; t++)
            put_gradients(c, x.b, x.h, t0 + t, 1.0f, x.dq + t * x.kp, x.dk + t * x.kp, x.de + t * x.kp, x.dg + t * x.kp,
                          x.du + t * x.vp);
    }
    save_state(x, x.grad, c.dinitial);
}

void run_tokens(const Call& c, bool back, int64_t b, int64_t h, float* memory) {
    Head x;
    x.c = &c;
    x.b = b;
    x.h = h;
    x.kp = up(c.k, VL);
    x.vp = up(c.v, VL);
    x.scale = bits_as<float>(uint32_t(c.scale_bits));
    carve(x, memory, back);
    if (back) backward(x);
    else forward(x);
}

Chunks chunks(const Call& c, int64_t b, int64_t h) {
    Chunks x{};
    x.c = &c;
    x.b = b;
    x.h = h;
    x.kp = up(c.k, VL);
    x.vp = up(c.v, VL);
    x.scale = bits_as<float>(uint32_t(c.scale_bits));
    x.vector = c.decay_vector;
    return x;
}

void run_chunks(const Call& c, bool back, int64_t b, int64_t h, float* memory) {
    Chunks x = chunks(c, b, h);
    lay_out(x, memory, back);
    if (back) backward(x);
    else forward(x);
}

int64_t room(const Call& c, bool back) {
    if (!c.chunked) return floats(c, back);
    Chunks x = chunks(c, 0, 0);
    return lay_out(x, nullptr, back);
}

void run(const Call& c, bool back) {
    const int64_t units = c.batch * c.hv;
#pragma omp parallel num_threads(int(c.threads)) if (c.threads > 1 && units > 1)
    {
        auto* memory = static_cast<float*>(std::aligned_alloc(64, size_t(up(4 * room(c, back), 64))));
#if defined(__x86_64__)
        const unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8040);  // subnormal numbers, which decayed states end in, are zero
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < units; unit++)
            (c.chunked ? run_chunks : run_tokens)(c, back, unit / c.hv, unit % c.hv, memory);
#if defined(__x86_64__)
        _mm_setcsr(mode);
#endif
        std::free(memory);
    }
}

}  // namespace

extern "C" void gdn_rule(const Call* c) { run(*c, false); }
extern "C" void gdn_rule_backward(const Call* c) { run(*c, true); }
