// Gated DeltaNet on one instruction set. A unit of work is one key head, with its value heads, of one sequence: convolution,
// gates, normalisation and recurrence for it touch nothing that another unit writes, so results depend neither on the
// number of threads nor on the other sequences of the batch. Included once per instruction set, inside its namespace.
#include "gdn_vec.h"

using gdn::Call;
using gdn::Sequence;
using gdn::Work;
using gdn::Write;

constexpr int64_t CHUNK = 64;  // tokens that there are buffers for
constexpr int64_t CHUNK_FROM = 12;  // tokens from which a sequence is worth the chunked form
constexpr float EPS = 1e-6f;

// Tokens of a chunk that starts at token t. What happens inside a chunk costs its square; the update of the state after
// it costs the same for any number. Where there is no state yet, products with it are saved.
static inline int64_t chunk_tokens(const Sequence& s, int64_t t) {
    const int64_t left = s.count - t, most = t > 0 || s.source >= 0 ? CHUNK / 2 : CHUNK;
    return left <= (most < CHUNK ? CHUNK * 3 / 4 : CHUNK) ? left : most;  // no chunk of a few tokens at the end
}

static inline int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

template <class T> struct TypeOf;
template <> struct TypeOf<float> { static constexpr int64_t id = gdn::F32; };
template <> struct TypeOf<BF16> { static constexpr int64_t id = gdn::BF16_; };
template <> struct TypeOf<FP16> { static constexpr int64_t id = gdn::F16; };

// One thread's memory, kept between calls: fresh pages cost more than a decode step.
struct Arena {
    char* base = nullptr;
    size_t size = 0, used = 0;
    ~Arena() { std::free(base); }
    void reset(size_t need) {
        used = 0;
        if (need <= size) return;
        std::free(base);
        size = need;
        base = static_cast<char*>(std::aligned_alloc(64, up(int64_t(need), 64)));
    }
    template <class T> T* take(int64_t n) {
        T* p = reinterpret_cast<T*>(base + used);
        used += size_t(up(n * int64_t(sizeof(T)), 64));
        return p;
    }
};

static inline float any(const char* p, int64_t type, int64_t i) {
    if (type == gdn::F32) return reinterpret_cast<const float*>(p)[i];
    if (type == gdn::BF16_) return one(reinterpret_cast<const BF16*>(p)[i]);
    return one(reinterpret_cast<const FP16*>(p)[i]);
}

static inline vf any_vector(const char* p, int64_t type, int64_t i, int64_t n) {
    if (type == gdn::F32) return load_some(reinterpret_cast<const float*>(p) + i, n);
    if (type == gdn::BF16_) return load_some(reinterpret_cast<const BF16*>(p) + i, n);
    return load_some(reinterpret_cast<const FP16*>(p) + i, n);
}

// Asks for memory that will be read, or written, soon. It goes to the second-level cache: the first has room for 24 lines on
// their way, which a stream of states uses up (decoding waits 1.6 times as long so, on Zen 4), and rows that lie a multiple
// of 4 KB apart would push each other out of it.
static inline void ask(const void* p) { __builtin_prefetch(p, 0, 2); }
static inline void expect(const char* p, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) ask(p + at);
}

// A run of channels that lie together both in the projections' rows and in the convolution.
struct Segment {
    int64_t in, channel, count;  // offset in a row of qkvz, first channel, channels
    float *out, *taps;           // out [tokens, out_row]; taps [width + 1, up(count, VL)], the bias last
    int64_t out_row;
    int64_t history;             // offset in a row of the unit's copy of the convolution state
};

// Buffers of one unit. Everything with rows has CHUNK of them.
struct Unit {
    const Work* work;
    const Call* c;
    const Sequence* s;
    int64_t index, next;  // this unit, and the one that this thread probably gets after it
    bool expected;        // whether the rows of this chunk have been asked for
    int64_t group, ratio, kp, vp, segments;
    Segment* segment;
    char* history;        // [width - 1, channels of the unit] in the model's dtype
    int64_t history_row;
    float *q, *k, *v;     // [CHUNK, kp], [CHUNK, kp], [ratio, CHUNK, vp]
    float *alpha, *beta;  // [ratio, CHUNK]
    float *q_scale, *k_scale; // [CHUNK], what q and k of a token are multiplied by to be normalised
    float* kq;            // [CHUNK], k . q
    float* out;           // [CHUNK, vp]

    int64_t row(int64_t t) const { return work->rows ? work->rows[s->first + t] : s->first + t; }
};

static int64_t unit_bytes(const Call& c) {
    const int64_t ratio = c.hv / c.hk, kp = up(c.k, VL), vp = up(c.v, VL), channels = 2 * kp + ratio * vp;
    const int64_t floats = CHUNK * (2 * kp + ratio * vp + 2 * ratio + 3 + vp) + (c.width + 1) * channels;
    return 4 * floats + int64_t(sizeof(Segment)) * (2 + ratio) + 4 * c.width * channels + 64 * (18 + ratio);
}

#if VL == 16
// Four taps of sixteen channels, [16][4] in memory, become four vectors.
template <class T> static inline void four_taps(const T* p, vf* w) {
    if constexpr (sizeof(T) == 2) {
        const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 32);
        const __m512i first = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 60, 56, 52, 48, 44, 40, 36, 32, 28,
                                               24, 20, 16, 12, 8, 4, 0);
        for (int i = 0; i < 4; i++) {
            const __m512i at = _mm512_add_epi16(first, _mm512_set1_epi16(short(i)));
            T kept[16];
            _mm256_storeu_si256((__m256i*)kept, _mm512_castsi512_si256(_mm512_permutex2var_epi16(a, at, b)));
            w[i] = load(kept);
        }
    } else {
        const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16), c = _mm512_loadu_ps(p + 32), d = _mm512_loadu_ps(p + 48);
        const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 28, 24, 20, 16, 12, 8, 4, 0);
        for (int i = 0; i < 4; i++) {
            const __m512i at = _mm512_add_epi32(first, _mm512_set1_epi32(i));
            const __m256 hi = _mm512_castps512_ps256(_mm512_permutex2var_ps(c, at, d));
            const __m512d lo = _mm512_castps_pd(_mm512_permutex2var_ps(a, at, b));
            w[i] = vf(_mm512_castpd_ps(_mm512_insertf64x4(lo, _mm256_castps_pd(hi), 1)));
        }
    }
}
#endif

static void load_taps(const Call& c, const Segment& g) {
    const int64_t padded = up(g.count, VL), width = c.width;
    for (int64_t ch = 0; ch < padded; ch += VL) {
        const int64_t n = g.count - ch < VL ? g.count - ch : VL, at = g.channel + ch;
        bool done = false;
#if VL == 16
        if (width == 4 && n == VL) {
            vf w[4];
            const char* p = c.weights + size_t(at) * 4 * gdn::size_of(c.weights_type);
            if (c.weights_type == gdn::F32) four_taps(reinterpret_cast<const float*>(p), w);
            else if (c.weights_type == gdn::BF16_) four_taps(reinterpret_cast<const BF16*>(p), w);
            else four_taps(reinterpret_cast<const FP16*>(p), w);
            for (int i = 0; i < 4; i++) store(g.taps + i * padded + ch, w[i]);
            done = true;
        }
#endif
        if (!done)
            for (int64_t i = 0; i < width; i++) {
                for (int64_t j = 0; j < VL; j++)
                    g.taps[i * padded + ch + j] = j < n ? any(c.weights, c.weights_type, (at + j) * width + i) : 0.0f;
            }
        store(g.taps + width * padded + ch, c.bias ? any_vector(c.bias, c.bias_type, at, n) : vf{});
    }
}

// Input of the convolution at token t of the sequence (t < 0: the state), at this segment.
template <class IO> static inline const IO* input(const Unit& u, const Segment& g, int64_t t) {
    if (t >= 0) return reinterpret_cast<const IO*>(u.c->qkvz) + u.row(t) * u.c->qkvz_row + g.in;
    return reinterpret_cast<const IO*>(u.history) + (u.c->width - 1 + t) * u.history_row + g.history;
}

constexpr int64_t CONV_ROWS = 16;  // tokens per sweep over the channels: few enough streams for the prefetcher

template <class IO, int W> static void convolve_rows(const Unit& u, const Segment& g, int64_t t0, int64_t first, int64_t n) {
    const int64_t padded = up(g.count, VL), width = W ? W : u.c->width;
    const IO* x[CONV_ROWS + 64];
    for (int64_t i = 0; i < n + width - 1; i++) x[i] = input<IO>(u, g, t0 + first + i - (width - 1));
    for (int64_t t = t0 + first + n; !u.expected && t < t0 + first + n + CONV_ROWS && t < u.s->count; t++) {
        const char* next = reinterpret_cast<const char*>(input<IO>(u, g, t));
        for (int64_t at = 0; at < g.count * int64_t(sizeof(IO)); at += 64) ask(next + at);
    }
    for (int64_t ch = 0; ch < padded; ch += VL) {
        const int64_t left = g.count - ch;  // below VL only in a last, partial vector
        const vf bias = load(g.taps + width * padded + ch);
        float* out = g.out + first * g.out_row + ch;
        if constexpr (W > 0) {
            vf w[W], window[W];
            for (int i = 0; i < W; i++) w[i] = load(g.taps + i * padded + ch);
            for (int i = 0; i + 1 < W; i++) window[i + 1] = load_some(x[i] + ch, left);
            int64_t t = 0;
            for (; t + 4 <= n; t += 4, out += 4 * g.out_row) {
                vf in[W + 3], y[4];
                for (int i = 0; i + 1 < W; i++) in[i] = window[i + 1];
                for (int i = 0; i < 4; i++) in[W - 1 + i] = load_some(x[t + W - 1 + i] + ch, left);
                for (int i = 0; i < 4; i++) y[i] = bias;
                for (int i = 0; i < W; i++)
                    for (int j = 0; j < 4; j++) y[j] = in[i + j] * w[i] + y[j];
                silu_four(y, x[0]);
                for (int j = 0; j < 4; j++) store(out + j * g.out_row, rounded(y[j], x[0]));
                for (int i = 0; i + 1 < W; i++) window[i + 1] = in[i + 4];
            }
            for (; t < n; t++, out += g.out_row) {
                for (int i = 0; i + 1 < W; i++) window[i] = window[i + 1];
                window[W - 1] = load_some(x[t + W - 1] + ch, left);
                vf y = bias;
                for (int i = 0; i < W; i++) y = window[i] * w[i] + y;
                store(out, rounded(silu(y, x[0]), x[0]));
            }
        } else {
            for (int64_t t = 0; t < n; t++, out += g.out_row) {
                vf y = bias;
                for (int64_t i = 0; i < width; i++) y = load_some(x[t + i] + ch, left) * load(g.taps + i * padded + ch) + y;
                store(out, rounded(silu(y, x[0]), x[0]));
            }
        }
    }
}

template <class IO> static void convolve(const Unit& u, const Segment& g, int64_t t0, int64_t first, int64_t n) {
    switch (u.c->width) {
        case 2: return convolve_rows<IO, 2>(u, g, t0, first, n);
        case 3: return convolve_rows<IO, 3>(u, g, t0, first, n);
        case 4: return convolve_rows<IO, 4>(u, g, t0, first, n);
        case 5: return convolve_rows<IO, 5>(u, g, t0, first, n);
        default: convolve_rows<IO, 0>(u, g, t0, first, n);
    }
}

static void scales(const float* x, int64_t n, int64_t kp, float scale, float* to) {
    for (int64_t t = 0; t < n; t++, x += kp) {
        vf s = {};
        for (int64_t i = 0; i < kp; i += VL) s = load(x + i) * load(x + i) + s;
        to[t] = scale / std::sqrt(sum(s) + EPS);
    }
}

// q and k and their scales, v, gates, and z copied, for tokens t0 .. t0 + n - 1 of the sequence.
template <class IO> static void prepare(const Unit& u, int64_t t0, int64_t n) {
    const Call& c = *u.c;
    const int64_t head = u.group * u.ratio, bytes = u.ratio * c.v * int64_t(sizeof(IO));
    const int64_t z_in = c.flat ? 2 * c.hk * c.k + c.hv * c.v + head * c.v
                                : u.group * (2 * c.k + 2 * u.ratio * c.v) + 2 * c.k + u.ratio * c.v;
    const int64_t b_in = c.flat ? head : 2 * head, a_in = c.flat ? c.hv + head : 2 * head + u.ratio;
    const auto from = [&](int64_t t) { return reinterpret_cast<const IO*>(c.qkvz) + u.row(t) * c.qkvz_row + z_in; };
    const auto to = [&](int64_t t) { return reinterpret_cast<IO*>(c.z) + u.row(t) * c.z_row + head * c.v; };
    // A few rows at a time, all of what the unit reads of them: their pages are then looked up once.
    for (int64_t first = 0; first < n; first += CONV_ROWS) {
        const int64_t some = n - first < CONV_ROWS ? n - first : CONV_ROWS;
        for (int64_t i = 0; i < u.segments; i++) convolve<IO>(u, u.segment[i], t0, first, some);
        for (int64_t t = first; t < first + some; t++) {
            if (!u.expected && t0 + t + CONV_ROWS < u.s->count) {
                expect(reinterpret_cast<const char*>(from(t0 + t + CONV_ROWS)), bytes);
                expect(reinterpret_cast<const char*>(to(t0 + t + CONV_ROWS)), bytes);
            }
            std::memcpy(to(t0 + t), from(t0 + t), size_t(bytes));
            const IO* ba = reinterpret_cast<const IO*>(c.ba) + u.row(t0 + t) * c.ba_row;
            for (int64_t h = 0; h < u.ratio; h++) {
                u.beta[h * CHUNK + t] = one(ba[b_in + h]);
                u.alpha[h * CHUNK + t] = one(ba[a_in + h]);
            }
        }
    }
    scales(u.q, n, u.kp, 1.0f / std::sqrt(float(c.k)), u.q_scale);
    scales(u.k, n, u.kp, 1.0f, u.k_scale);
    for (int64_t h = 0; h < u.ratio; h++) {
        const float rate = -std::exp(any(c.a_log, c.a_log_type, head + h)), shift = any(c.dt_bias, c.dt_bias_type, head + h);
        for (int64_t t = 0; t < n; t += VL) {
            float *b = u.beta + h * CHUNK + t, *a = u.alpha + h * CHUNK + t;
            if (n - t < VL)
                for (int64_t i = n - t; i < VL; i++) a[i] = b[i] = 0.0f;
            const vf x = load(a) + shift;
            // softplus, with the threshold of torch.nn.functional.softplus; a NaN takes the second branch and stays one
            store(a, vexp(rate * select(x <= 20.0f, log1p_positive(vexp(x)), x)));
            store(b, sigmoid(load(b)));
        }
    }
}

// The last width - 1 inputs up to and including token t go to a slot.
template <class IO> static void keep_inputs(const Unit& u, int64_t t, int64_t slot) {
    const Call& c = *u.c;
    const int64_t dim = 2 * c.hk * c.k + c.hv * c.v;
    IO* to = reinterpret_cast<IO*>(c.conv_state) + slot * c.conv_slot;
    for (int64_t r = 0; r + 1 < c.width; r++)
        for (int64_t i = 0; i < u.segments; i++) {
            const Segment& g = u.segment[i];
            std::memcpy(to + r * dim + g.channel, input<IO>(u, g, t - (c.width - 2) + r), size_t(g.count) * sizeof(IO));
        }
}

// Where segment i of a key head (q, k, then v of each value head) lies.
static void place(const Call& c, int64_t group, int64_t i, Segment& g) {
    const int64_t ratio = c.hv / c.hk, keys = c.hk * c.k, start = group * (2 * c.k + 2 * ratio * c.v);
    g.count = i < 2 ? c.k : c.v;
    g.channel = i < 2 ? i * keys + group * c.k : 2 * keys + (group * ratio + i - 2) * c.v;
    g.in = c.flat ? g.channel : i < 2 ? start + i * c.k : start + 2 * c.k + (i - 2) * c.v;
}

#include "gdn_ahead.h"
#include "gdn_step.h"
#include "gdn_words.h"
#include "gdn_chunk.h"

template <class IO> static void begin(Unit& u, Arena& arena) {
    const Call& c = *u.c;
    u.ratio = c.hv / c.hk;
    u.kp = up(c.k, VL);
    u.vp = up(c.v, VL);
    u.segments = 2 + u.ratio;
    u.q = arena.take<float>(CHUNK * u.kp);
    u.k = arena.take<float>(CHUNK * u.kp);
    u.v = arena.take<float>(u.ratio * CHUNK * u.vp);
    u.alpha = arena.take<float>(u.ratio * CHUNK);
    u.beta = arena.take<float>(u.ratio * CHUNK);
    u.q_scale = arena.take<float>(CHUNK);
    u.k_scale = arena.take<float>(CHUNK);
    u.kq = arena.take<float>(CHUNK);
    u.out = arena.take<float>(CHUNK * u.vp);
    u.segment = arena.take<Segment>(u.segments);
    u.history_row = 0;
    for (int64_t i = 0; i < u.segments; i++) {
        Segment& g = u.segment[i];
        place(c, u.group, i, g);
        g.out = i == 0 ? u.q : i == 1 ? u.k : u.v + (i - 2) * CHUNK * u.vp;
        g.out_row = i < 2 ? u.kp : u.vp;
        g.history = u.history_row;
        u.history_row += g.count;
        g.taps = arena.take<float>((c.width + 1) * up(g.count, VL));
        load_taps(c, g);
    }
    // A copy: states may be written before the last token that looks back at the old ones.
    u.history = arena.take<char>((c.width - 1) * u.history_row * int64_t(sizeof(IO)));
    const int64_t dim = 2 * c.hk * c.k + c.hv * c.v;
    for (int64_t r = 0; r + 1 < c.width; r++)
        for (int64_t i = 0; i < u.segments; i++) {
            const Segment& g = u.segment[i];
            IO* to = reinterpret_cast<IO*>(u.history) + r * u.history_row + g.history;
            const IO* from = reinterpret_cast<const IO*>(c.conv_state) + u.s->source * c.conv_slot + r * dim + g.channel;
            if (u.s->source < 0) std::memset(to, 0, size_t(g.count) * sizeof(IO));
            else std::memcpy(to, from, size_t(g.count) * sizeof(IO));
        }
}

template <class IO> static void run_unit(const Work& work, int64_t unit, int64_t next, Arena& arena, Ahead& ahead) {
    const Call& c = *work.call;
    Unit u;
    u.work = &work;
    u.c = &c;
    u.s = work.sequences + work.order[unit / c.hk];
    u.group = unit % c.hk;
    u.index = unit;
    u.next = next;
    u.expected = false;
    const bool chunked = u.s->count >= CHUNK_FROM;
    arena.reset(size_t(unit_bytes(c) + (chunked ? chunk_bytes(c) : step_bytes(c))));
    begin<IO>(u, arena);
#if HAVE_BF16_DOT
    constexpr bool dot_bf16 = std::is_same<IO, BF16>::value;
    using Dot = std::conditional_t<dot_bf16, DotBF16, DotF32>;
#else
    using Dot = DotF32;
#endif
    if (chunked) run_chunks<IO, Dot>(u, arena, ahead);
    else run_steps<IO>(u, arena);
}

// The end of the units that a thread takes at once, from `unit` on. Chunks are taken one by one, so that threads end
// together. Of steps, which are many and short, a thread takes half of its share of what is left, and all of it in the last
// sequence: the states of neighbours lie one after the other, and threads that took them in turn would ask for each
// other's memory.
static int64_t taken_to(const Work& work, int64_t unit) {
    const Call& c = *work.call;
    if (unit >= work.units || work.sequences[work.order[unit / c.hk]].count >= CHUNK_FROM) return unit + 1;
    const int64_t left = work.units - unit;
    return unit + std::max(std::max(left / 2, std::min(left, c.hk)) / c.threads, int64_t(1));
}

static void run(const Work& work) {
    const Call& c = *work.call;
    std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(int(c.threads)) if (c.threads > 1 && work.units > 1)
    {
        static thread_local Arena arena;
        Ahead ahead;
#if defined(__x86_64__) || defined(_M_X64)
        // A decayed state ends in subnormal numbers, a hundred times slower and below 1e-38: taken as zero.
        const unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8040);
#endif
        for (;;) {
            int64_t unit = taken.load(std::memory_order_relaxed), end;
            do end = taken_to(work, unit);
            while (unit < work.units && !taken.compare_exchange_weak(unit, end, std::memory_order_relaxed));
            if (unit >= work.units) break;
            for (; unit < end; unit++) {
                const int64_t next = unit + 1 < end ? unit + 1 : unit + c.threads;
                if (c.io == gdn::F32) run_unit<float>(work, unit, next, arena, ahead);
                else if (c.io == gdn::BF16_) run_unit<BF16>(work, unit, next, arena, ahead);
                else run_unit<FP16>(work, unit, next, arena, ahead);
            }
        }
#if defined(__x86_64__) || defined(_M_X64)
        _mm_setcsr(mode);
#endif
    }
}
