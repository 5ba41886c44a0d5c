// Ragged paged attention on the CPU: checks the index tensors, cuts the batch into units of work, hands them to threads.
// Compiled for the base instruction set; the arithmetic is in the files that rpa_kernels_* come from.
#include "rpa.h"
#include "rpa_write.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace {

// Query rows x group of a prefill tile: large enough that packing K and V (about five rows' worth) is 4% of the work,
// small enough that scores, weights and accumulators stay in the second-level cache.
constexpr int64_t TILE_ROWS = 128;
// Fewest cache positions that are worth a unit of their own.
constexpr int64_t LEAST_POSITIONS = 256;
// Units per thread that make an even distribution likely.
constexpr int64_t UNITS_PER_THREAD = 8;
// Fewer while streaming, where the end of a unit costs half a block and each further part is merged: 2% of decode16.
constexpr int64_t STREAM_UNITS_PER_THREAD = 4;

struct Plan {
  std::vector<RpaTile> tiles;
  std::vector<RpaUnit> units;
};

// False: something is out of range; the caller finds out what and says it in words.
bool valid(const RpaArgs& a) {
  const int64_t count = a.num_seqs[0];
  if (count < 0 || count > a.max_seqs || a.cu_q_lens[0] != 0) return false;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t q_len = int64_t(a.cu_q_lens[i + 1]) - a.cu_q_lens[i], kv_len = a.kv_lens[i];
    if (q_len < 0 || a.cu_q_lens[i + 1] > a.tokens) return false;
    if (kv_len < 0 || kv_len > a.pages_per_seq * a.page_size || q_len > kv_len) return false;
    if (q_len == 0) continue;
    const int64_t first = a.window > 0 ? std::max<int64_t>(0, kv_len - q_len - a.window + 1) : 0;
    const int32_t* pages = a.pages + i * a.pages_row;
    for (int64_t p = first / a.page_size; p * a.page_size < kv_len; ++p) {
      if (pages[p] < 0 || pages[p] >= a.num_pages) return false;
    }
  }
  return true;
}

int64_t first_visible(const RpaArgs& a, int64_t kv_len, int64_t q_len, int64_t row) {
  return a.window > 0 ? std::max<int64_t>(0, kv_len - q_len + row - a.window + 1) : 0;
}

// Adds one tile over kv0..kv1 in pieces of at most `piece` positions.
void add(Plan& plan, RpaTile tile, int64_t kv0, int64_t kv1, int64_t piece, int64_t rows, int32_t& parts) {
  const int64_t pieces = std::max<int64_t>(1, (kv1 - kv0 + piece - 1) / piece);
  const int64_t step = ((kv1 - kv0 + pieces - 1) / pieces + 31) / 32 * 32;
  tile.parts = int32_t((kv1 - kv0 + step - 1) / step);
  tile.first_part = parts;
  for (int64_t at = kv0; at < kv1; at += step) {
    const int64_t end = std::min(kv1, at + step);
    const double cost = double(end - at) * tile.heads * double(rows + RPA_STREAM_ROWS);
    plan.units.push_back({int32_t(plan.tiles.size()), parts++, at, end, cost});
  }
  if (tile.parts == 1) parts = tile.first_part;  // needs no room for a partial result
  plan.tiles.push_back(tile);
}

Plan make_plan(const RpaArgs& a) {
  const int64_t group = a.q_heads / a.kv_heads, per_tile = std::max<int64_t>(1, TILE_ROWS / group);
  const int64_t wanted = a.threads * UNITS_PER_THREAD;
  int64_t streamed = 0, products = 0;
  for (int64_t i = 0; i < a.num_seqs[0]; ++i) {
    const int64_t q_len = a.cu_q_lens[i + 1] - a.cu_q_lens[i], kv_len = a.kv_lens[i];
    if (q_len == 0) continue;
    if (q_len * group <= RPA_STREAM_ROWS) {
      streamed += kv_len - first_visible(a, kv_len, q_len, 0);
    } else {
      products += (q_len + per_tile - 1) / per_tile * a.kv_heads;
    }
  }
  // One thread never waits for another, so it has no use for pieces.
  const int64_t whole = std::numeric_limits<int32_t>::max();
  const int64_t share = streamed / (a.threads * STREAM_UNITS_PER_THREAD);
  const int64_t stream_piece = a.threads == 1 ? whole : std::max(LEAST_POSITIONS, share);
  const int64_t split = a.threads == 1 || products == 0 ? 1 : std::max<int64_t>(1, wanted / products);
  Plan plan;
  int32_t parts = 0;
  for (int64_t i = 0; i < a.num_seqs[0]; ++i) {
    const int64_t q_len = a.cu_q_lens[i + 1] - a.cu_q_lens[i], kv_len = a.kv_lens[i];
    if (q_len == 0) continue;
    if (q_len * group <= RPA_STREAM_ROWS) {
      const RpaTile tile{int32_t(i), 0, int32_t(q_len), 0, a.kv_heads, 0, 1};
      add(plan, tile, first_visible(a, kv_len, q_len, 0), kv_len, stream_piece, q_len * group, parts);
      continue;
    }
    // A short last tile would stream for one head at a time; even tiles avoid it.
    const int64_t tiles = (q_len + per_tile - 1) / per_tile, rows = (q_len + tiles - 1) / tiles;
    for (int64_t row = 0; row < q_len; row += rows) {
      const int64_t here = std::min(rows, q_len - row), begin = first_visible(a, kv_len, q_len, row);
      const int64_t end = kv_len - q_len + row + here;
      const int64_t piece = std::max(LEAST_POSITIONS, (end - begin + split - 1) / split);
      for (int32_t h = 0; h < a.kv_heads; ++h) {
        add(plan, {int32_t(i), int32_t(row), int32_t(here), h, 1, 0, 1}, begin, end, piece, here * group, parts);
      }
    }
  }
  std::stable_sort(plan.units.begin(), plan.units.end(), [](const RpaUnit& x, const RpaUnit& y) { return x.cost > y.cost; });
  return plan;
}

void fill_padding(const RpaArgs& a) {
  const int64_t used = a.cu_q_lens[a.num_seqs[0]], row = int64_t(a.q_heads) * a.head_dim * (a.q_type == RPA_F32 ? 4 : 2);
  std::memset(static_cast<char*>(a.out) + used * row, 0, (a.tokens - used) * row);
  if (a.lse != nullptr) {
    std::fill(a.lse + used * a.q_heads, a.lse + a.tokens * a.q_heads, -std::numeric_limits<float>::infinity());
  }
}

}  // namespace

// Writes every token into its slot. 1: a slot is out of range, and nothing was written.
extern "C" int32_t rpa_write(const RpaWriteArgs* args) {
  const RpaWriteArgs& a = *args;
  for (int64_t t = 0; t < a.tokens; ++t) {
    if (a.slots[t] < -1 || a.slots[t] >= a.num_slots) return 1;
  }
  const WriteRow write = writer(a.new_type, a.kv_type);
  // A thread costs about as much to wake as a few thousand numbers to convert.
  const bool many = a.threads > 1 && a.tokens * a.kv_heads * a.head_dim > 65536;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (many)
  for (int64_t t = 0; t < a.tokens; ++t) {
    if (a.slots[t] >= 0) write_token(a, write, t, a.slots[t]);
  }
  return 0;
}

// 0: done. 1: an index tensor holds something out of range; nothing was read or written through it.
// With `step`, first writes the step's K and V: row r of a sequence stands at position kv_len - q_len + r.
extern "C" int32_t rpa_attention(const RpaArgs* args, const RpaWriteArgs* step) {
  const RpaArgs& a = *args;
  if (!valid(a)) return 1;
  fill_padding(a);
  if (step != nullptr) {
    std::vector<int64_t> slots(step->tokens, -1);
    for (int64_t i = 0; i < a.num_seqs[0]; ++i) {
      int64_t position = a.kv_lens[i] - (a.cu_q_lens[i + 1] - a.cu_q_lens[i]);
      for (int64_t t = a.cu_q_lens[i]; t < a.cu_q_lens[i + 1]; ++t, ++position) {
        slots[t] = a.pages[i * a.pages_row + position / a.page_size] * a.page_size + position % a.page_size;
      }
    }
    RpaWriteArgs write = *step;
    write.slots = slots.data();
    rpa_write(&write);
  }
  const RpaKernels kernels = rpa_kernels();
  Plan plan = make_plan(a);
  const int64_t units = int64_t(plan.units.size());
  // Partial results lie one after another; room[p] is where part p starts.
  std::vector<int64_t> room;
  int64_t size = 0;
  std::vector<int64_t> merges;
  for (size_t i = 0; i < plan.tiles.size(); ++i) {
    const RpaTile& tile = plan.tiles[i];
    if (tile.parts == 1) continue;
    merges.push_back(int64_t(i));
    for (int32_t p = 0; p < tile.parts; ++p) {
      room.push_back(size);
      size += rpa_partial_size(a, tile, kernels.width);
    }
  }
  static thread_local std::vector<float> partials;
  if (int64_t(partials.size()) < size) partials.resize(size);
  float* const base = partials.data();
  std::atomic<int64_t> next(0), merge(0);
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(a.threads, units)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (int64_t i = next++, soon = 0; i < units; i = soon) {
      const RpaUnit& unit = plan.units[i];
      const RpaTile& tile = plan.tiles[unit.tile];
      soon = next++;
      const RpaUnit* after = soon < units ? &plan.units[soon] : nullptr;
      const RpaWork then{after == nullptr ? nullptr : &plan.tiles[after->tile], after};
      kernels.run(a, tile, unit, tile.parts == 1 ? nullptr : base + room[unit.part], then);
    }
    if (!merges.empty()) {
#pragma omp barrier
      std::vector<float*> parts;
      for (int64_t i = merge++; i < int64_t(merges.size()); i = merge++) {
        const RpaTile& tile = plan.tiles[merges[i]];
        parts.resize(tile.parts);
        for (int32_t p = 0; p < tile.parts; ++p) parts[p] = base + room[tile.first_part + p];
        kernels.merge(a, tile, parts.data());
      }
    }
  }
  return 0;
}
