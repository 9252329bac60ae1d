// Register-blocked inner kernels of the gated LoRA op. fp32 accumulation; rows by pointer.
//
//   dots    out[i, j] (+)= sum over c of x[i, c] w[j, c]              x_MK Aᵀ and dy_MN B
//   expand  y[i, c]    = from[i, c] + sum over j of h[i, j] w[j, c]   y += h~ Bᵀ and dx += u~ A
//   outer   g[j, c]    += sum over i of h[i, j] x[i, c]               dB = dyᵀ h~ and dA = u~ᵀ x
//
// i runs over rows, j over stacked ranks, c over columns (K or N). The factors w and the gradients
// g are packed (cpu/pack.h), so that an inner loop reads them as one stream: rows of a matrix with
// 768 or 3072 columns are multiples of 4 KB apart and fall into the same few cache sets.
//
// A sum that an earlier call began is added at the end: chains as long as a strip or a block round
// less than one of all columns or rows (dx at N = 3072: 1.0e-6 in one chain, peft 2.7e-7).
#pragma once

#include "cpu/vec.h"

namespace {

using std::int64_t;

// Accumulators and operands of a tile fill the registers: 32 with AVX-512, else 16.
#if defined(__AVX512F__)
constexpr int kTileVecs = 4, kExpandRows = 6;
constexpr int kDotRows = 8;
constexpr int kDirectRanks = 8, kMostDirectRanks = 32;
constexpr int64_t kDirectColumns = 2 * kWidth;
#else
constexpr int kTileVecs = 3, kExpandRows = 4;
constexpr int kDotRows = 6;
constexpr int kDirectRanks = 4, kMostDirectRanks = 8;
constexpr int64_t kDirectColumns = 3 * kWidth;
#endif
// Rows of a dot tile one vector wide: as many as hide the latency of a multiply-add. More would
// not fit the eight ways of a first-level cache set when rows are a multiple of 4 KB apart
// (3072 columns: 66 GFLOP/s with 8 rows, 33 with 12).
constexpr int kNarrowDotRows = 8;
constexpr int kWideRows = 8;  // the more of both
constexpr int kFewRanks = kWidth / 2;
constexpr int kOuterRanks = 4;
constexpr int64_t kTile = kTileVecs * kWidth;
// Columns worked on at once, a multiple of every kTile: a block's strip of rows with its strips of
// w and g stays in the second-level cache.
constexpr int64_t kStrip = 384;
static_assert(kStrip % kTile == 0);

// Asks for what the hardware does not see coming: a walk over a strip of a few rows, or down the rows
// of a few columns, is no stream to it.
template <class T>
FEDMS_INLINE void prefetch(const T* row, int64_t columns) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(row + c);
}

// Those of rows [begin, end) that there are.
template <class T>
FEDMS_INLINE void prefetch_rows(const T* const* x, int64_t m, int64_t begin, int64_t end,
                                int64_t column, int64_t columns) {
    for (int64_t i = begin; i < end && i < m; ++i) prefetch(x[i] + column, columns);
}

template <int Rows, int Vecs>
FEDMS_INLINE void dot_tile(const float* const* x, const float* const* panels, int64_t columns,
                           float* const* out, bool add) {
    Vec acc[Rows][Vecs];
    for (int i = 0; i < Rows; ++i) {
        for (int v = 0; v < Vecs; ++v) acc[i][v] = Vec{};
    }
    for (int64_t c = 0; c < columns; ++c) {
        Vec wv[Vecs];
        for (int v = 0; v < Vecs; ++v) wv[v] = load(panels[v] + c * kWidth);
        for (int i = 0; i < Rows; ++i) {
            const Vec xv = splat(x[i][c]);
            for (int v = 0; v < Vecs; ++v) acc[i][v] += xv * wv[v];
        }
    }
    for (int i = 0; i < Rows; ++i) {
        for (int v = 0; add && v < Vecs; ++v) acc[i][v] += load(out[i] + v * kWidth);
    }
    for (int i = 0; i < Rows; ++i) {
        for (int v = 0; v < Vecs; ++v) store(out[i] + v * kWidth, acc[i][v]);
    }
}

// Rows i0, i0 + 1, ... of x in fp32, from column `begin` on: where they are, or bf16 ones widened
// into `wide` [kWideRows, kStrip], so few at a time that they stay in the first-level cache. A tile
// that sticks out of the m rows repeats the last one, so it computes and stores that twice.
template <int Rows>
FEDMS_INLINE void fp32_rows(const float* const* x, int64_t m, int64_t i0, int64_t begin, int64_t,
                            float*, const float** rows) {
    for (int i = 0; i < Rows; ++i) rows[i] = x[i0 + i < m ? i0 + i : m - 1] + begin;
}

template <int Rows>
FEDMS_INLINE void fp32_rows(const bf16* const* x, int64_t m, int64_t i0, int64_t begin,
                            int64_t columns, float* wide, const float** rows) {
    static_assert(Rows <= kWideRows);
    for (int i = 0; i < Rows; ++i) {
        if (i0 + i >= m) {
            rows[i] = rows[i - 1];
            continue;
        }
        const bf16* from = x[i0 + i] + begin;
        float* to = wide + i * kStrip;
        rows[i] = to;
        int64_t c = 0;
        for (; c + kWidth <= columns; c += kWidth) store(to + c, load(from + c));
        if (c < columns) store_part(to + c, load_part(from + c, columns - c), columns - c);
    }
}

// `count` neighbouring panels, Vecs at a time, for all rows.
template <int Rows, int Vecs, class T>
void dot_panels(const T* const* x, int64_t m, const float* panels, int64_t panel_stride,
                int64_t count, int64_t begin, int64_t columns, float* out, int64_t ldo, bool add,
                float* wide) {
    for (int64_t i0 = 0; i0 < m; i0 += Rows) {
        const float* xi[Rows];
        fp32_rows<Rows>(x, m, i0, begin, columns, wide, xi);
        prefetch_rows(x, m, i0 + Rows, i0 + 2 * Rows, begin, columns);
        for (int64_t q = 0; q < count; q += Vecs) {
            const float* at[Vecs];
            float* oi[Rows];
            for (int v = 0; v < Vecs; ++v) at[v] = panels + (q + v) * panel_stride;
            for (int i = 0; i < Rows; ++i) {
                oi[i] = out + (i0 + i < m ? i0 + i : m - 1) * ldo + q * kWidth;
            }
            dot_tile<Rows, Vecs>(xi, at, columns, oi, add);
        }
    }
}

// Columns [begin, begin + columns) of x, at most kStrip of bf16, with `count` panels
// [columns][kWidth], panel_stride apart.
template <class T>
void dots(const T* const* x, int64_t m, const float* panels, int64_t panel_stride, int64_t count,
          int64_t begin, int64_t columns, float* out, int64_t ldo, bool add, float* wide) {
    const int64_t even = count / 2 * 2;
    if (even > 0) {
        dot_panels<kDotRows, 2>(x, m, panels, panel_stride, even, begin, columns, out, ldo, add,
                                wide);
    }
    if (even < count) {
        dot_panels<kNarrowDotRows, 1>(x, m, panels + even * panel_stride, panel_stride, 1, begin,
                                      columns, out + even * kWidth, ldo, add, wide);
    }
}

// `dots` of at most kFewRanks ranks: two rows times those are kWidth sums over vectors of columns,
// which end as the lanes of one. A rank in a lane of its own, as above, would leave half idle.
// tiles: [kFewRanks][kWidth], one behind the other from `begin` on.
template <class T>
void dots_of_few(const T* const* x, int64_t m, const float* tiles, int64_t begin, int64_t columns,
                 float* out, int64_t ldo, bool add) {
    for (int64_t i = 0; i < m; i += 2) {
        const auto at = [x, m, begin](int64_t row) { return x[row < m ? row : m - 1] + begin; };
        const T* const rows[] = {at(i), at(i + 1)};
        const T* const next[] = {at(i + 2), at(i + 3)};
        Vec acc[kWidth] = {};
        const auto step = [&](int64_t c, Vec first, Vec second) {
            for (int j = 0; j < kFewRanks; ++j) {
                const Vec wv = load(tiles + c * kFewRanks + j * kWidth);
                acc[j] += first * wv;
                acc[kFewRanks + j] += second * wv;
            }
        };
        int64_t c = 0;
        for (; c + kWidth <= columns; c += kWidth) {
            prefetch(next[0] + c, kWidth);
            prefetch(next[1] + c, kWidth);
            step(c, load(rows[0] + c), load(rows[1] + c));
        }
        if (c < columns) {
            step(c, load_part(rows[0] + c, columns - c), load_part(rows[1] + c, columns - c));
        }
        // A last row without a second one is stored as it is twice.
        float* to[] = {out + i * ldo, out + (i + 1 < m ? i + 1 : i) * ldo};
        Vec total = sums(acc);
        if (add) total += join(to[0], to[1]);
        split(total, to[0], to[1]);
    }
}

template <bool From, class T>
FEDMS_INLINE void expand_tile(T* const* y, const T* const* from, const float* const* h,
                              const float* w, int64_t r, int64_t c) {
    Vec acc[kExpandRows][kTileVecs] = {};
    each<kExpandRows>([&](auto i) {
        if constexpr (From) load_all<kTileVecs>(from[i] + c, acc[i]);
    });
    for (int64_t j = 0; j < r; ++j) {
        Vec wv[kTileVecs];
        for (int v = 0; v < kTileVecs; ++v) wv[v] = load(w + j * kTile + v * kWidth);
        each<kExpandRows>([&](auto i) {
            const Vec hv = splat(h[i][j]);
            each<kTileVecs>([&](auto v) { acc[i][v] += hv * wv[v]; });
        });
    }
    each<kExpandRows>([&](auto i) { store_all<kTileVecs>(y[i] + c, acc[i]); });
}

// The last columns, fewer than a tile: computed beside y.
template <bool From, class T>
void expand_rest(T* const* y, const T* const* from, const float* const* h, const float* w,
                 int64_t r, int64_t c, int64_t n) {
    T beside[kExpandRows][kTile];
    T* rows[kExpandRows];
    const auto bytes = static_cast<std::size_t>(n) * sizeof(T);
    std::memset(beside, 0, sizeof beside);
    for (int i = 0; i < kExpandRows; ++i) {
        rows[i] = beside[i];
        if (From) std::memcpy(beside[i], from[i] + c, bytes);
    }
    expand_tile<From, T>(rows, rows, h, w, r, 0);
    for (int i = 0; i < kExpandRows; ++i) std::memcpy(y[i] + c, beside[i], bytes);
}

// w: tiles of [r][kTile], tile_stride apart. y starts from the rows `from` (y itself to add to it),
// without From from zero and is written only.
template <bool From, class T>
void expand(T* const* y, const T* const* from, int64_t m, const float* h, int64_t ldh,
            const float* w, int64_t tile_stride, int64_t r, int64_t columns) {
    for (int64_t strip = 0; strip < columns; strip += kStrip) {
        const int64_t end = strip + kStrip < columns ? strip + kStrip : columns;
        for (int64_t i0 = 0; i0 < m; i0 += kExpandRows) {
            T* yi[kExpandRows];
            const T* fi[kExpandRows];
            const float* hi[kExpandRows];
            for (int i = 0; i < kExpandRows; ++i) {
                const int64_t row = i0 + i < m ? i0 + i : m - 1;
                yi[i] = y[row];
                fi[i] = From ? from[row] : nullptr;
                hi[i] = h + row * ldh;
            }
            int64_t c = strip;
            const float* tile = w + strip / kTile * tile_stride;
            for (; c + kTile <= end; c += kTile, tile += tile_stride) {
                prefetch_rows(From ? from : y, m, i0 + kExpandRows, i0 + 2 * kExpandRows, c, kTile);
                expand_tile<From, T>(yi, fi, hi, tile, r, c);
            }
            if (c < end) expand_rest<From, T>(yi, fi, hi, tile, r, c, end - c);
        }
    }
}

// g [Ranks][kTile] += hᵀ x for m rows of x, Vecs vectors of each from row(i) on. Not inlined: within
// its caller GCC 12 spills the accumulators (46 GFLOP/s instead of 85).
template <int Ranks, int Vecs, class Row>
__attribute__((noinline)) void outer_tile(float* g, const float* h, int64_t ldh, int64_t m,
                                          const Row row) {
    Vec acc[Ranks][Vecs];
    for (int j = 0; j < Ranks; ++j) {
        for (int v = 0; v < Vecs; ++v) acc[j][v] = Vec{};
    }
    for (int64_t i = 0; i < m; ++i) {
        Vec xv[Vecs];
        const auto* x = row(i);
        for (int v = 0; v < Vecs; ++v) xv[v] = load(x + v * kWidth);
        for (int j = 0; j < Ranks; ++j) {
            const Vec hv = splat(h[i * ldh + j]);
            for (int v = 0; v < Vecs; ++v) acc[j][v] += hv * xv[v];
        }
    }
    for (int j = 0; j < Ranks; ++j) {
        for (int v = 0; v < Vecs; ++v) {
            float* to = g + j * kTile + v * kWidth;
            store(to, load(to) + acc[j][v]);
        }
    }
}

// Columns [begin, begin + columns) of x, begin a multiple of kTile. g: tiles of [r][kTile],
// tile_stride apart, the first one that of `begin`. A walk down the rows serves a few ranks. Where
// many walks are needed, and for the last columns, a tile of x is first copied to `copy`
// [m][kTile], in fp32 and without gaps.
template <class T>
void outer(float* g, int64_t tile_stride, const float* h, int64_t ldh, int64_t r,
           const T* const* x, int64_t m, int64_t begin, int64_t columns, float* copy) {
    for (int64_t c = begin; c < begin + columns; c += kTile, g += tile_stride) {
        const int64_t n = begin + columns - c;
        if (n >= kTile && r % kDirectRanks == 0 && r <= kMostDirectRanks) {
            for (int64_t v = c; v < c + kTile; v += kDirectColumns) {
                const auto row = [x, v](int64_t i) {
                    prefetch(x[i] + v + kDirectColumns, kDirectColumns);
                    return x[i] + v;
                };
                for (int64_t j = 0; j < r; j += kDirectRanks) {
                    outer_tile<kDirectRanks, kDirectColumns / kWidth>(g + j * kTile + v - c, h + j,
                                                                      ldh, m, row);
                }
            }
            continue;
        }
        for (int64_t i = 0; i < m; ++i) {
            for (int v = 0; v < kTileVecs; ++v) {
                const int64_t at = v * kWidth;
                const Vec part = n >= at + kWidth ? load(x[i] + c + at)
                                 : n > at         ? load_part(x[i] + c + at, n - at)
                                                  : Vec{};
                store(copy + i * kTile + at, part);
            }
            prefetch(x[i] + c + kTile, kTile);
        }
        const auto row = [copy](int64_t i) { return copy + i * kTile; };
        int64_t j = 0;
        for (; j + kOuterRanks <= r; j += kOuterRanks) {
            outer_tile<kOuterRanks, kTileVecs>(g + j * kTile, h + j, ldh, m, row);
        }
        for (; j < r; ++j) outer_tile<1, kTileVecs>(g + j * kTile, h + j, ldh, m, row);
    }
}

}  // namespace
