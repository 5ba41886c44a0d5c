// The entry: arguments as Python holds them, what to do with each sequence, rows that nobody owns, and the instruction sets
// of this machine. Whatever is wrong with a call only makes it return 1; the reference's checks then say what.
#include "gdn.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "torch_tensor.h"

namespace {

using host::Tensor;
using host::Vector;

// Where each argument of opreg::gdn_attention stands, then what gdn.py adds.
enum Argument {
    CORE, Z, QKVZ, BA, K_HEADS, V_HEADS, K_DIM, V_DIM, CONV_STATE, SSM_STATE, WEIGHTS, BIAS, ACTIVATION, A_LOG, DT_BIAS,
    PREFILLS, DECODES, SPEC_DECODES, HAS_INITIAL, STARTS, TOKENS, INDEX, SPEC_STARTS, SPEC_TOKENS, SPEC_INDEX, ACCEPTED,
    ACTUAL, TP, FLAT, NULL_SLOT, SOURCES, CHECKPOINT_TOKENS, CHECKPOINT_SLOTS, THREADS, KERNELS, PREPARED, ARGUMENTS
};
constexpr int64_t LARGEST = 1 << 20;  // heads and head sizes: products of two stay numbers

using Run = void (*)(const gdn::Work*);

host::Table table;
Run best_kernels;

// What gdn.py packs where the metadata needs more than a look.
struct Prepared {
    int64_t count;
    const gdn::Sequence* sequences;
    const int64_t* rows;
    const gdn::Write* writes;
};

struct Plan {
    std::vector<gdn::Sequence> sequences;
    std::vector<int64_t> rows, slots, order;
    std::vector<char> owned;
    const int64_t* row_of = nullptr;
    const gdn::Write* writes = nullptr;
};

int64_t type_of(int32_t scalar) {
    return scalar == host::FLOAT32 ? gdn::F32 : scalar == host::BFLOAT16 ? gdn::BF16_ : scalar == host::FLOAT16 ? gdn::F16 : -1;
}

bool in(int64_t x, int64_t low, int64_t high) { return low <= x && x <= high; }

// Sizes, dtypes and strides; the same conditions as `sizes` in reference/gdn_args.py.
bool read(host::Arguments& a, gdn::Call& c) {
    a.expect({CORE, Z, QKVZ, BA, CONV_STATE, SSM_STATE, WEIGHTS, BIAS, A_LOG, DT_BIAS, HAS_INITIAL, STARTS, TOKENS, INDEX});
    const int64_t tp = a.integer(TP), k_heads = a.integer(K_HEADS), v_heads = a.integer(V_HEADS);
    c.k = a.integer(K_DIM);
    c.v = a.integer(V_DIM);
    const char* activation = a.table.as_text(a.args[ACTIVATION], nullptr);
    if (!activation) a.refuse();
    if (a.wrong || (std::strcmp(activation, "silu") && std::strcmp(activation, "swish"))) return false;
    if (!in(tp, 1, LARGEST) || !in(k_heads, 1, LARGEST) || !in(v_heads, 1, LARGEST) || k_heads % tp || v_heads % tp) return false;
    if (!in(c.k, 1, LARGEST) || !in(c.v, 1, LARGEST) || v_heads % k_heads) return false;
    c.hk = k_heads / tp;
    c.hv = v_heads / tp;
    const Tensor qkvz = a.tensor(QKVZ), ba = a.tensor(BA), core = a.tensor(CORE), z = a.tensor(Z), conv = a.tensor(CONV_STATE),
                 ssm = a.tensor(SSM_STATE), weights = a.tensor(WEIGHTS), bias = a.tensor(BIAS, true), a_log = a.tensor(A_LOG),
                 dt_bias = a.tensor(DT_BIAS);
    c.flat = a.truth(FLAT);
    if (a.wrong || qkvz.rank != 2 || weights.rank != 2 || ssm.rank != 4 || conv.rank != 3) return false;
    const int64_t channels = 2 * c.hk * c.k + c.hv * c.v;
    c.rows = qkvz.sizes[0];
    c.actual = a.none(ACTUAL) ? c.rows : a.integer(ACTUAL);
    c.width = weights.sizes[1];
    c.slots = ssm.sizes[0];
    const bool shapes = qkvz.is({c.rows, channels + c.hv * c.v}) && ba.is({c.rows, 2 * c.hv}) && core.is({c.rows, c.hv, c.v}) &&
                        z.is({c.rows, c.hv, c.v}) && weights.is({channels, c.width}) && c.width >= 1 && a_log.is({c.hv}) &&
                        dt_bias.is({c.hv}) && (!bias.given() || bias.is({channels})) && ssm.is({c.slots, c.hv, c.v, c.k}) &&
                        conv.is({c.slots, conv.sizes[1], channels}) && conv.sizes[1] >= c.width - 1;
    if (a.wrong || !shapes || !in(c.actual, 0, c.rows)) return false;
    c.io = type_of(qkvz.type);
    c.state = type_of(ssm.type);
    const auto own = [&](const Tensor& t) { return t.type == qkvz.type; };
    const auto parameter = [&](const Tensor& t) { return !t.given() || ((own(t) || t.type == host::FLOAT32) && t.dense()); };
    if (c.io < 0 || c.state < 0 || !own(ba) || !own(core) || !own(z) || !own(conv)) return false;
    if (!parameter(weights) || !parameter(bias) || !parameter(a_log) || !parameter(dt_bias)) return false;
    for (const Tensor* t : {&qkvz, &ba, &core, &z, &conv, &ssm})
        if (!t->dense(1)) return false;
    c.core = core.data, c.core_row = core.strides[0];
    c.z = z.data, c.z_row = z.strides[0];
    c.qkvz = qkvz.data, c.qkvz_row = qkvz.strides[0];
    c.ba = ba.data, c.ba_row = ba.strides[0];
    c.conv_state = conv.data, c.conv_slot = conv.strides[0];
    c.ssm_state = ssm.data, c.ssm_slot = ssm.strides[0];
    c.weights = weights.data, c.weights_type = type_of(weights.type);
    c.bias = bias.data, c.bias_type = bias.given() ? type_of(bias.type) : 0;
    c.a_log = a_log.data, c.a_log_type = type_of(a_log.type);
    c.dt_bias = dt_bias.data, c.dt_bias_type = type_of(dt_bias.type);
    c.threads = a.integer(THREADS);
    return !a.wrong && c.threads >= 1;
}

// The sequences of a batch without drafts, checkpoints and other slots to start from, which gdn.py prepares.
bool plan_batch(host::Arguments& a, const gdn::Call& c, Plan& plan) {
    const int64_t prefills = a.integer(PREFILLS), decodes = a.integer(DECODES), count = prefills + decodes, null = a.integer(NULL_SLOT);
    if (a.wrong || !in(prefills, 0, INT32_MAX) || !in(decodes, 0, INT32_MAX) || a.integer(SPEC_DECODES) || a.wrong) return false;
    if (!a.none(SOURCES) || !a.none(CHECKPOINT_TOKENS) || !a.none(CHECKPOINT_SLOTS)) return false;
    if (!count) return true;
    const Tensor given[] = {a.tensor(STARTS, true), a.tensor(TOKENS, true), a.tensor(HAS_INITIAL, true)};
    const Vector starts(given[0]), tokens(given[1]), known(given[2]), index(a.tensor(INDEX));
    const bool started = given[0].given(), scattered = given[1].given(), some_known = given[2].given();
    if (a.wrong || (started ? !starts.indices(count + 1) : prefills > 0)) return false;
    if (!index.indices(count) || (some_known && !known.truths(count))) return false;
    int64_t end = started ? starts[0] : 0;
    if (end < 0) return false;
    for (int64_t i = 0; i < count; i++) {
        const int64_t first = end, slot = index[i];
        end = started ? starts[i + 1] : i + 1;
        if (end < first || end > c.actual) return false;
        if (first == end || slot == -1 || slot == null) continue;
        if (!in(slot, 0, c.slots - 1)) return false;
        plan.slots.push_back(slot);
        plan.sequences.push_back({first, end - first, !some_known || known[i] ? slot : -1, slot, 0, 0});
    }
    std::sort(plan.slots.begin(), plan.slots.end());
    if (std::adjacent_find(plan.slots.begin(), plan.slots.end()) != plan.slots.end()) return false;
    if (!scattered) return true;
    if (!tokens.indices(end)) return false;
    plan.owned.assign(size_t(c.rows), 0);
    for (int64_t i = 0; i < end; i++) {
        const int64_t row = tokens[i];
        if (!in(row, 0, c.actual - 1)) return false;
        plan.rows.push_back(row);
    }
    // Only rows of live sequences are written.
    for (const auto& s : plan.sequences)
        for (int64_t t = s.first; t < s.first + s.count; t++)
            if (plan.owned[size_t(plan.rows[size_t(t)])]++) return false;
    plan.row_of = plan.rows.data();
    return true;
}

void zero_row(const gdn::Call& c, int64_t row) {
    const size_t item = gdn::size_of(c.io), bytes = size_t(c.hv * c.v) * item;
    std::memset(c.core + size_t(row * c.core_row) * item, 0, bytes);
    std::memset(c.z + size_t(row * c.z_row) * item, 0, bytes);
}

// Rows that no live sequence owns, then the sequences; returns how many tokens there are.
void compute(const gdn::Call& c, Plan& plan, Run run) {
    int64_t live = 0;
    for (const auto& s : plan.sequences) live += s.count;
    if (live != c.rows) {
        plan.owned.assign(size_t(c.rows), 0);
        for (const auto& s : plan.sequences)
            for (int64_t t = s.first; t < s.first + s.count; t++) plan.owned[size_t(plan.row_of ? plan.row_of[t] : t)] = 1;
        for (int64_t r = 0; r < c.rows; r++)
            if (!plan.owned[size_t(r)]) zero_row(c, r);
    }
    if (plan.sequences.empty()) return;
    for (size_t i = 0; i < plan.sequences.size(); i++) plan.order.push_back(int64_t(i));
    std::stable_sort(plan.order.begin(), plan.order.end(), [&](int64_t a, int64_t b) {
        return plan.sequences[size_t(a)].count > plan.sequences[size_t(b)].count;
    });
    const gdn::Work work{&c, plan.sequences.data(), plan.row_of, plan.writes, int64_t(plan.sequences.size()) * c.hk, plan.order.data()};
    // Others may run meanwhile, but for the shortest calls, where handing the lock over and back costs more than it gives.
    void* lock = live > 4 ? table.release_lock() : nullptr;
    run(&work);
    if (lock) table.take_lock(lock);
}

// 0: done, 1: nothing was done (wrong, or to be prepared), 2: there is no memory.
int64_t attention(host::Object* const* args, int64_t count) {
    host::Arguments a{table, args};
    gdn::Call c;
    if (count != ARGUMENTS || !read(a, c)) return 1;
    Plan plan;
    const auto* prepared = reinterpret_cast<const Prepared*>(a.integer(PREPARED));
    if (prepared) {
        plan.sequences.assign(prepared->sequences, prepared->sequences + prepared->count);
        plan.row_of = prepared->rows;
        plan.writes = prepared->writes;
    } else if (!plan_batch(a, c, plan)) {
        return 1;
    }
    const auto forced = reinterpret_cast<Run>(a.integer(KERNELS));
    if (a.wrong) return 1;
    compute(c, plan, forced ? forced : best_kernels);
    return 0;
}

host::Object* call(host::Object*, host::Object* const* args, int64_t count) {
    int64_t code = 2;
    try {
        code = attention(args, count);
    } catch (const std::bad_alloc&) {
    }
    return table.from_integer(long(code));
}

// PyMethodDef of Python's stable ABI; 0x80 is METH_FASTCALL.
struct Method {
    const char* name;
    host::Object* (*call)(host::Object*, host::Object* const*, int64_t);
    int flags;
    const char* doc;
} method = {"gdn_attention", call, 0x80, nullptr};

}  // namespace

// 0: any, 1: AVX2, 2: AVX-512 with bfloat16; the best that this machine has.
extern "C" int64_t gdn_instruction_set() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return wide && __builtin_cpu_supports("avx512bf16") ? 2 : 1;
#else
    return 0;
#endif
}

// What to make a Python function of. It returns a number (see `attention`) and never raises.
extern "C" void* gdn_method(const host::Table* found, Run kernels) {
    table = *found;
    best_kernels = kernels;
    return &method;
}
