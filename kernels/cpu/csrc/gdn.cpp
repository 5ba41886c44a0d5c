// The entry: what to do with each sequence, rows that nobody owns, and the instruction sets of this machine.
#include "gdn.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

int64_t entry(const char* p, int64_t wide, int64_t i) {
    return wide ? reinterpret_cast<const int64_t*>(p)[i] : int64_t(reinterpret_cast<const int32_t*>(p)[i]);
}

void zero_row(const gdn::Call& c, int64_t row) {
    const size_t item = gdn::size_of(c.io), bytes = size_t(c.hv * c.v) * item;
    std::memset(c.core + size_t(row * c.core_row) * item, 0, bytes);
    std::memset(c.z + size_t(row * c.z_row) * item, 0, bytes);
}

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

// 0, or 1 where the values of the metadata cannot be (the caller finds out which and says so).
extern "C" int64_t gdn_attention(const gdn::Call* call, void (*run)(const gdn::Work*)) {
    const gdn::Call& c = *call;
    std::vector<gdn::Sequence> sequences;
    std::vector<int64_t> rows;
    const int64_t* row_of = nullptr;
    std::vector<char> owned(size_t(c.rows), 0);
    int64_t live = 0;
    if (c.prepared) {
        const auto* given = reinterpret_cast<const gdn::Sequence*>(c.prepared);
        sequences.assign(given, given + c.sequences);
        row_of = c.prepared_rows;
    } else if (c.sequences > 0) {
        int64_t end = c.starts ? entry(c.starts, c.starts_wide, 0) : 0;
        if (end < 0) return 1;
        std::vector<int64_t> slots;
        for (int64_t i = 0; i < c.sequences; i++) {
            const int64_t first = end;
            end = c.starts ? entry(c.starts, c.starts_wide, i + 1) : i + 1;
            if (end < first || end > c.actual) return 1;
            const int64_t slot = entry(c.index, c.index_wide, i);
            if (first == end || slot == -1 || slot == c.null_slot) continue;
            if (slot < 0 || slot >= c.slots) return 1;
            slots.push_back(slot);
            const bool known = !c.has_initial || c.has_initial[i];
            sequences.push_back({first, end - first, known ? slot : -1, slot, 0, 0});
        }
        std::sort(slots.begin(), slots.end());
        if (std::adjacent_find(slots.begin(), slots.end()) != slots.end()) return 1;
        if (c.tokens) {
            rows.resize(size_t(end));
            for (int64_t i = 0; i < end; i++) {
                rows[size_t(i)] = entry(c.tokens, c.tokens_wide, i);
                if (rows[size_t(i)] < 0 || rows[size_t(i)] >= c.actual) return 1;
                if (owned[size_t(rows[size_t(i)])]++) return 1;
            }
            row_of = rows.data();
        }
    }
    for (const auto& s : sequences) live += s.count;
    if (live != c.rows) {
        std::fill(owned.begin(), owned.end(), 0);
        for (const auto& s : sequences)
            for (int64_t t = s.first; t < s.first + s.count; t++) owned[size_t(row_of ? row_of[t] : t)] = 1;
        for (int64_t r = 0; r < c.rows; r++)
            if (!owned[size_t(r)]) zero_row(c, r);
    }
    if (sequences.empty()) return 0;
    std::vector<int64_t> order(sequences.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = int64_t(i);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return sequences[size_t(a)].count > sequences[size_t(b)].count; });
    const gdn::Work work{call, sequences.data(), row_of, reinterpret_cast<const gdn::Write*>(c.prepared_writes),
                         int64_t(sequences.size()) * c.hk, order.data()};
    run(&work);
    return 0;
}
