// Row kernels of the gated LoRA op: one thread's rows, block by block. Compiled once per
// instruction set (FEDMS_ROWS names the table it defines), so nothing here may have external
// linkage but that table.
//
// A block is worked on in items: a list of rows that all use the same consecutive experts. Dense
// calls have one item a block, segments one a run, top-k routing one an expert. Within an item
// everything is done while the block's rows are in the second-level cache, so x, y, dy and dx cross
// memory once.
#include "cpu/drop_row.h"
#include "cpu/few_rows.h"
#include "cpu/gated_lora.h"
#include "cpu/items.h"
#include "cpu/micro.h"

namespace {

using fedms::Problem;
using fedms::Scratch;

// Where an item's values of h and of the gates are; `e` counts from the item's first expert.
struct Layout {
    const Problem& p;
    const Item& item;
    int64_t largest;  // largest rank, the width of one slot of h in top-k calls
    float* h(int64_t i) const {
        const int64_t at = item.pairs ? item.slots[i] * largest : item.column;
        return p.h + item.row(i) * p.h_width + at;
    }
    float coefficient(int64_t i, int64_t e) const {
        const float s = p.scale[item.first + e];
        if (p.gates == nullptr) return s;
        const int64_t column = item.pairs ? item.slots[i] : item.first + e;
        return s * p.gates[item.row(i) * p.gate_row + column * p.gate_col];
    }
    float* dgate(int64_t i, int64_t e) const {
        const int64_t width = item.pairs ? p.top_k : p.num_experts;
        const int64_t column = item.pairs ? item.slots[i] : item.first + e;
        return p.dgates + item.row(i) * width + column;
    }
};

template <class T>
const T** row_pointers(const Scratch& s, int slot, const void* base, int64_t width,
                       const Item& it) {
    const T** rows = reinterpret_cast<const T**>(s.rows) + slot * s.block;
    for (int64_t i = 0; i < it.n; ++i) rows[i] = static_cast<const T*>(base) + it.row(i) * width;
    return rows;
}

template <class T>
T** row_pointers_mut(const Scratch& s, int slot, void* base, int64_t width, const Item& it) {
    return const_cast<T**>(row_pointers<T>(s, slot, base, width, it));
}

// out[i] = x[i] * mask(expert, row i) / (1 - p), fp32.
template <class T>
const float** drop_rows(const Problem& p, const Scratch& s, const T* const* x, const Item& item,
                        int64_t expert) {
    const std::uint64_t key =
        fedms::expert_key(item.seed, expert - item.first + item.mask_expert);
    const auto threshold = static_cast<std::uint32_t>(p.dropout_p * 4294967296.0);
    const float inverse = static_cast<float>(1.0 / (1.0 - p.dropout_p));
    const float** rows = reinterpret_cast<const float**>(s.rows) + 3 * s.block;
    for (int64_t i = 0; i < item.n; ++i) {
        const std::uint64_t row = fedms::row_key(key, item.row(i) - item.mask_row);
        const auto lo = static_cast<std::uint32_t>(row), hi = static_cast<std::uint32_t>(row >> 32);
        float* out = s.dropped + i * p.k;
        rows[i] = out;
        drop_row(x[i], out, p.k, lo, hi, threshold, inverse);
    }
    return rows;
}

// to = from * expand(gate * scale), `from` and `to` at the item's first rank; they may be one.
void gate(const Layout& at, const float* from, float* to, int64_t ld) {
    const Problem& p = at.p;
    const int64_t r0 = p.ranks[at.item.first];
    for (int64_t i = 0; i < at.item.n; ++i, from += ld, to += ld) {
        for (int64_t e = at.item.first; e < at.item.last; ++e) {
            const float c = at.coefficient(i, e - at.item.first);
            for (int64_t j = p.ranks[e] - r0; j < p.ranks[e + 1] - r0; ++j) to[j] = from[j] * c;
        }
    }
}

// out = columns [begin, begin + columns) of the rows times those of the panels [c] that cover ranks
// [r0, r1), added to what columns before have given; out's columns are absolute ranks, those beside
// the range are overwritten too.
template <class T>
void dots_of(const Scratch& s, const T* const* rows, const Item& item, int64_t r0, int64_t r1,
             int64_t c, int64_t begin, int64_t columns, float* out) {
    if (s.few) {
        dots_of_few(rows, item.n, s.panels + begin * kFewRanks, begin, columns, out, s.ld,
                    begin > 0);
        return;
    }
    const int64_t first = r0 / kWidth, last = (r1 + kWidth - 1) / kWidth;
    const float* panels = s.panels + (first * c + begin) * kWidth;
    dots(rows, item.n, panels, c * kWidth, last - first, begin, columns, out + first * kWidth, s.ld,
         begin > 0, s.wide);
}

// Calls f(begin, columns) for every strip of c columns.
template <class F>
void for_each_strip(int64_t c, const F& f) {
    for (int64_t begin = 0; begin < c; begin += kStrip) {
        f(begin, begin + kStrip < c ? kStrip : c - begin);
    }
}

// h of the item in s.h.
template <class T>
void shrink(const Problem& p, const Scratch& s, const Item& item) {
    const T* const* x = row_pointers<T>(s, 0, p.x, p.k, item);
    if (p.dropout_p <= 0.0) {
        for_each_strip(p.k, [&](int64_t begin, int64_t columns) {
            dots_of(s, x, item, p.ranks[item.first], p.ranks[item.last], p.k, begin, columns, s.h);
        });
        return;
    }
    for (int64_t e = item.first; e < item.last; ++e) {
        const int64_t r0 = p.ranks[e], r1 = p.ranks[e + 1];
        if (r0 == r1) continue;
        const float* const* dropped = drop_rows(p, s, x, item, e);
        dots_of(s, dropped, item, r0, r1, p.k, 0, p.k, s.one);
        for (int64_t i = 0; i < item.n; ++i) {
            std::memcpy(s.h + i * s.ld + r0, s.one + i * s.ld + r0, (r1 - r0) * sizeof(float));
        }
    }
}

// y = from + left times the tiles of ranks [r0, r1); from may be null.
template <class T>
void expand_rows(T* const* y, const T* const* from, const Problem& p, const Scratch& s,
                 const Item& item, int64_t r0, int64_t r1, const float* left, int64_t columns) {
    const float* tiles = s.tiles + r0 * kTile;
    const int64_t stride = p.ranks[p.num_experts] * kTile;
    from ? expand<true>(y, from, item.n, left + r0, s.ld, tiles, stride, r1 - r0, columns)
         : expand<false>(y, from, item.n, left + r0, s.ld, tiles, stride, r1 - r0, columns);
}

// True when one item writes all of a row of y; else items add to what the row starts from.
bool writes_once(const Problem& p) {
    return p.top_k < 0 && p.num_runs < 0;
}

// Rows [begin, end) of y as they start, where their items come next.
void start_rows(const Problem& p, int64_t begin, int64_t end) {
    if (writes_once(p) || p.y == p.y_from) return;
    const int64_t size = p.n * (p.bf16 ? 2 : 4);
    std::memcpy(static_cast<char*>(p.y) + begin * size,
                static_cast<const char*>(p.y_from) + begin * size,
                static_cast<std::size_t>((end - begin) * size));
}

template <class T>
void forward_item(const Problem& p, const Scratch& s, const Item& item, int64_t largest) {
    const int64_t r0 = p.ranks[item.first], r1 = p.ranks[item.last];
    if (r0 == r1) return;
    const Layout at{p, item, largest};
    shrink<T>(p, s, item);
    if (p.h != nullptr) {
        for (int64_t i = 0; i < item.n; ++i) {
            std::memcpy(at.h(i), s.h + i * s.ld + r0, (r1 - r0) * sizeof(float));
        }
    }
    gate(at, s.h + r0, s.h + r0, s.ld);
    T** y = row_pointers_mut<T>(s, 1, p.y, p.n, item);
    const T* const* from = y;
    if (writes_once(p)) {
        from = p.y_from == nullptr ? nullptr
                                   : row_pointers<T>(s, 2, p.y_from, p.y_from_row, item);
    }
    expand_rows<T>(y, from, p, s, item, r0, r1, s.h, p.n);
}

// Calls f(e, end) for neighbouring experts of the item that are all wanted; zeroes their partial
// gradients (tiles of `columns` columns) when they are touched first.
template <class F>
void for_each_wanted(const Problem& p, const Item& item, const bool* want, bool* touched,
                     float* partial, int64_t columns, const F& f) {
    const int64_t total = p.ranks[p.num_experts];
    for (int64_t e = item.first; e < item.last;) {
        if (!want[e]) {
            ++e;
            continue;
        }
        int64_t end = e;
        for (; end < item.last && want[end]; ++end) {
            if (touched[end]) continue;
            touched[end] = true;
            const int64_t r = p.ranks[end + 1] - p.ranks[end];
            for (int64_t t = 0; t * kTile < columns; ++t) {
                std::memset(partial + (t * total + p.ranks[end]) * kTile, 0,
                            static_cast<std::size_t>(r * kTile) * sizeof(float));
            }
        }
        f(e, end);
        e = end;
    }
}

// Adds leftᵀ rows into the partial gradients of the wanted experts, columns [begin, begin +
// columns) of all `c`.
template <class T>
void add_outer(const Problem& p, const Scratch& s, const Item& item, const bool* want,
               bool* touched, float* partial, int64_t c, const float* left, const T* const* rows,
               int64_t begin, int64_t columns) {
    const int64_t stride = p.ranks[p.num_experts] * kTile;
    for_each_wanted(p, item, want, touched, partial, c, [&](int64_t e, int64_t end) {
        const int64_t r0 = p.ranks[e];
        outer(partial + begin / kTile * stride + r0 * kTile, stride, left + r0, s.ld,
              p.ranks[end] - r0, rows, item.n, begin, columns, s.copy);
    });
}

bool any(const bool* want, const Item& item) {
    for (int64_t e = item.first; e < item.last; ++e) {
        if (want[e]) return true;
    }
    return false;
}

// h of the item as the forward kept it, in s.h.
void fetch_h(const Layout& at, const Scratch& s) {
    const int64_t r0 = at.p.ranks[at.item.first], r = at.p.ranks[at.item.last] - r0;
    for (int64_t i = 0; i < at.item.n; ++i) {
        std::memcpy(s.h + i * s.ld + r0, at.h(i), static_cast<std::size_t>(r) * sizeof(float));
    }
}

// dg from s.h and s.u, both without gates; with routing the pairs of this item alone.
void gate_gradient(const Layout& at, const Scratch& s) {
    const Problem& p = at.p;
    for (int64_t i = 0; i < at.item.n; ++i) {
        for (int64_t e = at.item.first; e < at.item.last; ++e) {
            float dot = 0.0f;
            for (int64_t j = p.ranks[e]; j < p.ranks[e + 1]; ++j) {
                dot += s.h[i * s.ld + j] * s.u[i * s.ld + j];
            }
            *at.dgate(i, e - at.item.first) = p.scale[e] * dot;
        }
    }
}

// dA and dx of one expert under dropout, where each expert has an input of its own. u: u~.
template <class T>
void backward_dropped(const Problem& p, const Scratch& s, const Item& item, const T* const* x,
                      T* const* dx) {
    const int64_t r0 = p.ranks[item.first], r1 = p.ranks[item.last];
    if (p.want_da[item.first]) {
        add_outer(p, s, item, p.want_da, s.da_touched, s.da, p.k, s.u,
                  drop_rows(p, s, x, item, item.first), 0, p.k);
    }
    if (dx == nullptr) return;
    float** rows = const_cast<float**>(reinterpret_cast<const float**>(s.rows)) + 3 * s.block;
    for (int64_t i = 0; i < item.n; ++i) rows[i] = s.dropped + i * p.k;
    expand_rows<float>(rows, nullptr, p, s, item, r0, r1, s.u, p.k);
    drop_rows(p, s, static_cast<const float* const*>(rows), item, item.first);  // in place: undrop
    for (int64_t i = 0; i < item.n; ++i) {
        int64_t c = 0;
        for (; c + kWidth <= p.k; c += kWidth) {
            store(dx[i] + c, load(dx[i] + c) + load(rows[i] + c));
        }
        if (c < p.k) {
            const Vec total = load_part(dx[i] + c, p.k - c) + load_part(rows[i] + c, p.k - c);
            store_part(dx[i] + c, total, p.k - c);
        }
    }
}

template <class T>
void backward_item(const Problem& p, const Scratch& s, const Item& item, int64_t largest) {
    const int64_t r0 = p.ranks[item.first], r1 = p.ranks[item.last];
    if (r0 == r1) return;
    const Layout at{p, item, largest};
    const bool want_da = any(p.want_da, item), want_db = any(p.want_db, item);
    const bool want_u = want_da || p.dx != nullptr || p.dgates != nullptr;

    // dB takes h~ and dg takes h: h~ goes where `one` is, which only dropout's forward uses.
    if (want_db || p.dgates != nullptr) fetch_h(at, s);
    if (want_db) gate(at, s.h + r0, s.one + r0, s.ld);
    const T* const* dy = row_pointers<T>(s, 0, p.dy, p.n, item);
    for_each_strip(p.n, [&](int64_t begin, int64_t columns) {
        if (want_u) dots_of(s, dy, item, r0, r1, p.n, begin, columns, s.u);
        if (want_db) {
            add_outer(p, s, item, p.want_db, s.db_touched, s.db, p.n, s.one, dy, begin, columns);
        }
    });
    if (p.dgates != nullptr) gate_gradient(at, s);
    if (!want_da && p.dx == nullptr) return;

    gate(at, s.u + r0, s.u + r0, s.ld);
    const T* const* x = want_da ? row_pointers<T>(s, 1, p.x, p.k, item) : nullptr;
    T** dx = p.dx != nullptr ? row_pointers_mut<T>(s, 2, p.dx, p.k, item) : nullptr;
    if (p.dropout_p > 0.0) {
        for (int64_t e = item.first; e < item.last; ++e) {
            Item one = item;
            one.first = e;
            one.last = e + 1;
            one.mask_expert += e - item.first;
            if (p.ranks[e] != p.ranks[e + 1]) backward_dropped(p, s, one, x, dx);
        }
        return;
    }
    if (want_da) add_outer(p, s, item, p.want_da, s.da_touched, s.da, p.k, s.u, x, 0, p.k);
    if (dx != nullptr) expand_rows<T>(dx, p.dx_add ? dx : nullptr, p, s, item, r0, r1, s.u, p.k);
}

int64_t largest_rank(const Problem& p) {
    int64_t largest = 0;
    for (int64_t e = 0; e < p.num_experts; ++e) {
        const int64_t r = p.ranks[e + 1] - p.ranks[e];
        if (r > largest) largest = r;
    }
    return largest;
}

void forward_rows(const Problem& p, const Scratch& s, int64_t begin, int64_t end) {
    const int64_t largest = largest_rank(p);
    const auto start = [&](int64_t row, int64_t stop) { start_rows(p, row, stop); };
    for_each_item(p, s, begin, end, start, [&](const Item& item) {
        p.bf16 ? forward_item<bf16>(p, s, item, largest) : forward_item<float>(p, s, item, largest);
    });
}

void backward_rows(const Problem& p, const Scratch& s, int64_t begin, int64_t end) {
    const int64_t largest = largest_rank(p);
    const auto start = [](int64_t, int64_t) {};
    for_each_item(p, s, begin, end, start, [&](const Item& item) {
        p.bf16 ? backward_item<bf16>(p, s, item, largest)
               : backward_item<float>(p, s, item, largest);
    });
}

}  // namespace

namespace fedms {

#define FEDMS_TEXT_(x) #x
#define FEDMS_TEXT(x) FEDMS_TEXT_(x)
extern const RowKernels FEDMS_ROWS;
const RowKernels FEDMS_ROWS = {FEDMS_TEXT(FEDMS_ISA),
                               kWidth,
                               kTile,
                               kWideRows * kStrip,
                               forward_rows,
                               backward_rows,
                               few_shrink_ranks,
                               few_expand_columns,
                               base_backward_columns};

}  // namespace fedms
