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
#else
constexpr int kTileVecs = 3, kExpandRows = 4;
constexpr int kDotRows = 6;
#endif
// Rows of a dot tile one vector wide: as many as hide the latency of a multiply-add. More would
// not fit the eight ways of a first-level cache set when rows are a multiple of 4 KB apart
// (3072 columns: 66 GFLOP/s with 8 rows, 33 with 12).
constexpr int kNarrowDotRows = 8;
constexpr int kOuterRanks = 4;
constexpr int64_t kTile = kTileVecs * kWidth;
// Columns worked on at once, a multiple of every kTile: a block's strip of rows with its strips of
// w and g stays in the second-level cache.
constexpr int64_t kStrip = 384;
static_assert(kStrip % kTile == 0);

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

// Vecs neighbouring panels for all rows. A tile that sticks out of the rows repeats the last one:
// repeated rows load, compute and store the same value.
template <int Rows, int Vecs>
void dot_panels(const float* const* x, int64_t m, const float* const* panels, int64_t begin,
                int64_t columns, float* out, int64_t ldo, bool add) {
    for (int64_t i0 = 0; i0 < m; i0 += Rows) {
        const float* xi[Rows];
        float* oi[Rows];
        for (int i = 0; i < Rows; ++i) {
            const int64_t row = i0 + i < m ? i0 + i : m - 1;
            xi[i] = x[row] + begin;
            oi[i] = out + row * ldo;
        }
        dot_tile<Rows, Vecs>(xi, panels, columns, oi, add);
    }
}

// Columns [begin, begin + columns) of x with `count` panels [columns][kWidth], panel_stride apart.
inline void dots(const float* const* x, int64_t m, const float* panels, int64_t panel_stride,
                 int64_t count, int64_t begin, int64_t columns, float* out, int64_t ldo, bool add) {
    int64_t q = 0;
    for (; q + 2 <= count; q += 2) {
        const float* two[] = {panels + q * panel_stride, panels + (q + 1) * panel_stride};
        dot_panels<kDotRows, 2>(x, m, two, begin, columns, out + q * kWidth, ldo, add);
    }
    if (q < count) {
        const float* one[] = {panels + q * panel_stride};
        dot_panels<kNarrowDotRows, 1>(x, m, one, begin, columns, out + q * kWidth, ldo, add);
    }
}

// `dots` of at most kWidth / 2 ranks: two columns share a vector, pairs [columns / 2][kWidth]
// (pack_pairs), and half of the lanes are not idle. Columns [begin, begin + columns) of x; an odd
// one is the last of the row.
inline void dot_pairs(const float* const* x, int64_t m, const float* pairs, int64_t begin,
                      int64_t columns, float* out, int64_t ldo, bool add) {
    constexpr int kRows = kNarrowDotRows;
    for (int64_t i0 = 0; i0 < m; i0 += kRows) {
        const float* xi[kRows];
        Vec acc[kRows] = {};
        for (int i = 0; i < kRows; ++i) xi[i] = x[i0 + i < m ? i0 + i : m - 1] + begin;
        int64_t c = 0;
        for (; c + 2 <= columns; c += 2) {
            const Vec wv = load(pairs + c / 2 * kWidth);
            for (int i = 0; i < kRows; ++i) acc[i] += splat_pair(xi[i] + c) * wv;
        }
        if (c < columns) {
            const Vec wv = load(pairs + c / 2 * kWidth);
            for (int i = 0; i < kRows; ++i) {
                const float last[] = {xi[i][c], 0.0f};
                acc[i] += splat_pair(last) * wv;
            }
        }
        for (int i = 0; i < kRows && i0 + i < m; ++i) {
            float* to = out + (i0 + i) * ldo;
            store(to, add ? load(to) + sums_of_pairs(acc[i]) : sums_of_pairs(acc[i]));
        }
    }
}

template <bool From, class T>
FEDMS_INLINE void expand_tile(T* const* y, const T* const* from, const float* const* h,
                              const float* w, int64_t r, int64_t c) {
    Vec acc[kExpandRows][kTileVecs];
    for (int i = 0; i < kExpandRows; ++i) {
        for (int v = 0; v < kTileVecs; ++v) {
            acc[i][v] = From ? load(from[i] + c + v * kWidth) : Vec{};
        }
    }
    for (int64_t j = 0; j < r; ++j) {
        Vec wv[kTileVecs];
        for (int v = 0; v < kTileVecs; ++v) wv[v] = load(w + j * kTile + v * kWidth);
        for (int i = 0; i < kExpandRows; ++i) {
            const Vec hv = splat(h[i][j]);
            for (int v = 0; v < kTileVecs; ++v) acc[i][v] += hv * wv[v];
        }
    }
    for (int i = 0; i < kExpandRows; ++i) {
        for (int v = 0; v < kTileVecs; ++v) store(y[i] + c + v * kWidth, acc[i][v]);
    }
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
                expand_tile<From, T>(yi, fi, hi, tile, r, c);
            }
            if (c < end) expand_rest<From, T>(yi, fi, hi, tile, r, c, end - c);
        }
    }
}

// Not inlined: within its caller GCC 12 spills the accumulators (46 GFLOP/s instead of 85).
template <int Ranks>
__attribute__((noinline)) void outer_tile(float* g, const float* h, int64_t ldh, const float* x, int64_t m) {
    Vec acc[Ranks][kTileVecs];
    for (int j = 0; j < Ranks; ++j) {
        for (int v = 0; v < kTileVecs; ++v) acc[j][v] = Vec{};
    }
    for (int64_t i = 0; i < m; ++i) {
        Vec xv[kTileVecs];
        for (int v = 0; v < kTileVecs; ++v) xv[v] = load(x + i * kTile + v * kWidth);
        for (int j = 0; j < Ranks; ++j) {
            const Vec hv = splat(h[i * ldh + j]);
            for (int v = 0; v < kTileVecs; ++v) acc[j][v] += hv * xv[v];
        }
    }
    for (int j = 0; j < Ranks; ++j) {
        for (int v = 0; v < kTileVecs; ++v) {
            float* to = g + j * kTile + v * kWidth;
            store(to, load(to) + acc[j][v]);
        }
    }
}

// Columns [begin, begin + columns) of x, begin a multiple of kTile. g: tiles of [r][kTile],
// tile_stride apart, the first one that of `begin`. `copy`: [m][kTile], a tile of x in fp32 for the
// walks down its rows, one for every kOuterRanks ranks.
template <class T>
void outer(float* g, int64_t tile_stride, const float* h, int64_t ldh, int64_t r,
           const T* const* x, int64_t m, int64_t begin, int64_t columns, float* copy) {
    for (int64_t c = begin; c < begin + columns; c += kTile, g += tile_stride) {
        const int64_t n = begin + columns - c;
        for (int64_t i = 0; i < m; ++i) {
            for (int v = 0; v < kTileVecs; ++v) {
                const int64_t at = v * kWidth;
                const Vec part = n >= at + kWidth ? load(x[i] + c + at)
                                 : n > at         ? load_part(x[i] + c + at, n - at)
                                                  : Vec{};
                store(copy + i * kTile + at, part);
                // Down the rows the hardware sees no stream: ask for this row's next tile.
                __builtin_prefetch(x[i] + c + kTile + at);
            }
        }
        int64_t j = 0;
        for (; j + kOuterRanks <= r; j += kOuterRanks) {
            outer_tile<kOuterRanks>(g + j * kTile, h + j, ldh, copy, m);
        }
        for (; j < r; ++j) outer_tile<1>(g + j * kTile, h + j, ldh, copy, m);
    }
}

}  // namespace
