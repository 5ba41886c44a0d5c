// Asking for memory before it is needed, while there is arithmetic to do: rows of the call's tensors are short pieces in
// pages of their own, which the hardware does not see coming.

// What a unit reads first besides its rows: the weights and the state of its convolution.
static void expect_unit(const Work& work, int64_t unit) {
    const Call& c = *work.call;
    if (unit >= work.units) return;
    const Sequence& s = work.sequences[work.order[unit / c.hk]];
    const int64_t item = int64_t(gdn::size_of(c.io)), dim = 2 * c.hk * c.k + c.hv * c.v;
    for (int64_t i = 0; i < 2 + c.hv / c.hk; i++) {
        Segment g;
        place(c, unit % c.hk, i, g);
        const int64_t taps = c.width * int64_t(gdn::size_of(c.weights_type));
        expect(c.weights + g.channel * taps, g.count * taps);
        for (int64_t r = 0; s.source >= 0 && r + 1 < c.width; r++)
            expect(c.conv_state + (s.source * c.conv_slot + r * dim + g.channel) * item, g.count * item);
    }
}

// The first rows of a unit.
static void expect_rows(const Work& work, int64_t unit) {
    const Call& c = *work.call;
    if (unit >= work.units) return;
    const Sequence& s = work.sequences[work.order[unit / c.hk]];
    const int64_t item = int64_t(gdn::size_of(c.io));
    for (int64_t i = 0; i < 2 + c.hv / c.hk; i++) {
        Segment g;
        place(c, unit % c.hk, i, g);
        for (int64_t t = s.first; t < s.first + s.count && t < s.first + CONV_ROWS; t++)
            expect(c.qkvz + ((work.rows ? work.rows[t] : t) * c.qkvz_row + g.in) * item, g.count * item);
    }
}

// All that a chunk reads of the projections and writes of the outputs, asked for in small steps during the chunk before it.
struct Ahead {
    struct Piece {
        const char* base;
        int64_t row, bytes;
    };
    const Work* work = nullptr;
    int64_t unit = -1, first = 0;  // whose chunk, and its first token
    int64_t row = 0, end = 0;      // rows of Work left
    Piece pieces[7];
    int64_t count = 0, piece = 0, steps = 0, calls = 1, due = 0;

    // The chunk of `unit` that starts with token `t`, in `times` calls of `go_on`.
    void start(const Work& w, int64_t u, int64_t t, int64_t times) {
        work = &w, unit = u, first = t, row = end = piece = due = 0;
        if (u >= w.units) return;
        const Call& c = *w.call;
        const Sequence& s = w.sequences[w.order[u / c.hk]];
        const int64_t item = int64_t(gdn::size_of(c.io)), ratio = c.hv / c.hk, group = u % c.hk, values = ratio * c.v * item;
        Segment q, k, v;
        place(c, group, 0, q);
        place(c, group, 1, k);
        place(c, group, 2, v);
        const int64_t z = c.flat ? v.in + c.hv * c.v : v.in + ratio * c.v, out = group * values;
        const int64_t gates = (c.flat ? group * ratio : 2 * group * ratio) * item, in_row = c.qkvz_row * item;
        const Piece all[] = {{c.qkvz + q.in * item, in_row, c.k * item}, {c.qkvz + k.in * item, in_row, c.k * item},
                             {c.qkvz + v.in * item, in_row, values},     {c.qkvz + z * item, in_row, values},
                             {c.ba + gates, c.ba_row * item, 1},       {c.z + out, c.z_row * item, values},
                             {c.core + out, c.core_row * item, values}};
        count = int64_t(sizeof(all) / sizeof(Piece));
        std::copy(all, all + count, pieces);
        row = s.first + t;
        end = row + chunk_tokens(s, t);
        steps = (end - row) * count;
        calls = times;
    }
    void go_on() {
        for (due += steps; due >= calls && row < end; due -= calls) {
            const Piece& p = pieces[piece];
            const char* at = p.base + (work->rows ? work->rows[row] : row) * p.row;
            expect(at, p.bytes);
            if (++piece == count) piece = 0, row++;
        }
    }
    // Whether all of that chunk was asked for.
    bool has(int64_t u, int64_t t) const { return unit == u && first == t && row == end; }
};
