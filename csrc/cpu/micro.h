// Register-blocked inner kernels of the gated LoRA op. fp32 accumulation; rows by pointer.
//
//   dots    out[i, j] = sum over c of x[i, c] w[j, c]           x_MK Aᵀ and dy_MN B
//   expand  y[i, c]  += sum over j of h[i, j] w[j, c]           y += h~ Bᵀ and dx += u~ A
//   outer   g[j, c]  += sum over i of h[i, j] x[i, c]           dB = dyᵀ h~ and dA = u~ᵀ x
//
// i runs over rows, j over stacked ranks, c over columns (K or N). x and y are T (fp32 or bf16),
// everything else fp32. A tile that sticks out of the rows or ranks repeats the last one instead of
// having its own code: repeated rows compute and store the same value.
#pragma once

#include "cpu/vec.h"

namespace {

using std::int64_t;

#if defined(__AVX512F__)  // 32 registers
constexpr int kDotRows = 4, kDotRanks = 4;
constexpr int kExpandRows = 6, kExpandVecs = 4;
constexpr int kOuterRanks = 8, kOuterVecs = 3;
#else  // 16 registers
constexpr int kDotRows = 2, kDotRanks = 4;
constexpr int kExpandRows = 4, kExpandVecs = 2;
constexpr int kOuterRanks = 4, kOuterVecs = 2;
#endif
// Columns walked before the next row tile: keeps R x kStrip floats of w in the first-level cache.
constexpr int64_t kStrip = 512;
// Columns of a dot product before the next ranks: a tile's rows of x stay in the first-level cache.
constexpr int64_t kChunk = 1024;
// Column tiles of an outer product before the next ranks. One tile alone (rows 12 KB apart fall
// into the same cache sets) and whole rows (a block of x then passes the second-level cache) are
// both slower.
constexpr int64_t kOuterTiles = 8;

// Columns [begin, end) of one tile; `total` gets kDotRows x kDotRanks sums.
template <class T>
FEDMS_INLINE void dot_tile(const T* const* x, const float* const* w, int64_t begin, int64_t end,
                           float* total) {
    Vec acc[kDotRows * kDotRanks] = {};
    int64_t c = begin;
    for (; c + kWidth <= end; c += kWidth) {
        Vec wv[kDotRanks];
        for (int j = 0; j < kDotRanks; ++j) wv[j] = load(w[j] + c);
        for (int i = 0; i < kDotRows; ++i) {
            const Vec xv = load(x[i] + c);
            for (int j = 0; j < kDotRanks; ++j) acc[i * kDotRanks + j] += xv * wv[j];
        }
    }
    if (c < end) {
        Vec wv[kDotRanks];
        for (int j = 0; j < kDotRanks; ++j) wv[j] = load_part(w[j] + c, end - c);
        for (int i = 0; i < kDotRows; ++i) {
            const Vec xv = load_part(x[i] + c, end - c);
            for (int j = 0; j < kDotRanks; ++j) acc[i * kDotRanks + j] += xv * wv[j];
        }
    }
    for (int g = 0; g < kDotRows * kDotRanks; g += kWidth) store(total + g, sums(acc + g));
}

template <class T>
void dots(const T* const* x, int64_t m, const float* const* w, int64_t r, int64_t columns,
          float* out, int64_t ldo) {
    for (int64_t i0 = 0; i0 < m; i0 += kDotRows) {
        const T* xi[kDotRows];
        for (int i = 0; i < kDotRows; ++i) xi[i] = x[i0 + i < m ? i0 + i : m - 1];
        for (int64_t begin = 0; begin < columns; begin += kChunk) {
            const int64_t end = begin + kChunk < columns ? begin + kChunk : columns;
            for (int64_t j0 = 0; j0 < r; j0 += kDotRanks) {
                const float* wj[kDotRanks];
                for (int j = 0; j < kDotRanks; ++j) wj[j] = w[j0 + j < r ? j0 + j : r - 1];
                float total[kDotRows * kDotRanks];
                dot_tile(xi, wj, begin, end, total);
                for (int i = 0; i < kDotRows && i0 + i < m; ++i) {
                    for (int j = 0; j < kDotRanks && j0 + j < r; ++j) {
                        float& to = out[(i0 + i) * ldo + j0 + j];
                        to = total[i * kDotRanks + j] + (begin > 0 ? to : 0.0f);
                    }
                }
            }
        }
    }
}

template <int Vecs, class T>
FEDMS_INLINE void expand_tile(T* const* y, const float* const* h, const float* const* w, int64_t r,
                              int64_t c) {
    Vec acc[kExpandRows][Vecs];
    for (int i = 0; i < kExpandRows; ++i) {
        for (int v = 0; v < Vecs; ++v) acc[i][v] = load(y[i] + c + v * kWidth);
    }
    for (int64_t j = 0; j < r; ++j) {
        Vec wv[Vecs];
        for (int v = 0; v < Vecs; ++v) wv[v] = load(w[j] + c + v * kWidth);
        for (int i = 0; i < kExpandRows; ++i) {
            const Vec hv = splat(h[i][j]);
            for (int v = 0; v < Vecs; ++v) acc[i][v] += hv * wv[v];
        }
    }
    for (int i = 0; i < kExpandRows; ++i) {
        for (int v = 0; v < Vecs; ++v) store(y[i] + c + v * kWidth, acc[i][v]);
    }
}

template <class T>
void expand(T* const* y, int64_t m, const float* h, int64_t ldh, const float* const* w, int64_t r,
            int64_t columns) {
    constexpr int64_t kTile = kExpandVecs * kWidth;
    for (int64_t strip = 0; strip < columns; strip += kStrip) {
        const int64_t end = strip + kStrip < columns ? strip + kStrip : columns;
        for (int64_t i0 = 0; i0 < m; i0 += kExpandRows) {
            T* yi[kExpandRows];
            const float* hi[kExpandRows];
            for (int i = 0; i < kExpandRows; ++i) {
                const int64_t row = i0 + i < m ? i0 + i : m - 1;
                yi[i] = y[row];
                hi[i] = h + row * ldh;
            }
            int64_t c = strip;
            for (; c + kTile <= end; c += kTile) expand_tile<kExpandVecs>(yi, hi, w, r, c);
            for (; c + kWidth <= end; c += kWidth) expand_tile<1>(yi, hi, w, r, c);
            if (c < end) {
                const int64_t n = end - c;
                for (int i = 0; i < kExpandRows && i0 + i < m; ++i) {
                    Vec acc = load_part(yi[i] + c, n);
                    for (int64_t j = 0; j < r; ++j) acc += splat(hi[i][j]) * load_part(w[j] + c, n);
                    store_part(yi[i] + c, acc, n);
                }
            }
        }
    }
}

template <int Vecs, bool Full, class T>
FEDMS_INLINE void outer_tile(float* const* g, const float* h, int64_t ldh, const int64_t* rank,
                             const T* const* x, int64_t m, int64_t c) {
    Vec acc[kOuterRanks][Vecs];
    for (int j = 0; j < kOuterRanks; ++j) {
        for (int v = 0; v < Vecs; ++v) acc[j][v] = load(g[j] + c + v * kWidth);
    }
    for (int64_t i = 0; i < m; ++i) {
        Vec xv[Vecs];
        for (int v = 0; v < Vecs; ++v) xv[v] = load(x[i] + c + v * kWidth);
        // Down the rows the hardware sees no stream: ask for the next tile's columns of this row.
        for (int v = 0; v < Vecs; ++v) __builtin_prefetch(x[i] + c + (Vecs + v) * kWidth);
        const float* hi = h + i * ldh;
        for (int j = 0; j < kOuterRanks; ++j) {
            const Vec hv = splat(Full ? hi[j] : hi[rank[j]]);
            for (int v = 0; v < Vecs; ++v) acc[j][v] += hv * xv[v];
        }
    }
    for (int j = 0; j < kOuterRanks; ++j) {
        for (int v = 0; v < Vecs; ++v) store(g[j] + c + v * kWidth, acc[j][v]);
    }
}

template <class T>
void outer(float* g, int64_t ldg, const float* h, int64_t ldh, int64_t r, const T* const* x,
           int64_t m, int64_t columns) {
    constexpr int64_t kTile = kOuterVecs * kWidth;
    constexpr int64_t kOuterStrip = kOuterTiles * kTile;
    for (int64_t strip = 0; strip < columns; strip += kOuterStrip) {
        const int64_t end = strip + kOuterStrip < columns ? strip + kOuterStrip : columns;
        for (int64_t j0 = 0; j0 < r; j0 += kOuterRanks) {
            float* gj[kOuterRanks];
            int64_t rank[kOuterRanks];
            for (int j = 0; j < kOuterRanks; ++j) {
                rank[j] = j0 + j < r ? j0 + j : r - 1;
                gj[j] = g + rank[j] * ldg;
            }
            const bool full = j0 + kOuterRanks <= r;
            int64_t c = strip;
            for (; c + kTile <= end; c += kTile) {
                full ? outer_tile<kOuterVecs, true>(gj, h + j0, ldh, rank, x, m, c)
                     : outer_tile<kOuterVecs, false>(gj, h, ldh, rank, x, m, c);
            }
            for (; c + kWidth <= end; c += kWidth) {
                full ? outer_tile<1, true>(gj, h + j0, ldh, rank, x, m, c)
                     : outer_tile<1, false>(gj, h, ldh, rank, x, m, c);
            }
            for (int j = 0; c < end && j < kOuterRanks && j0 + j < r; ++j) {
                Vec acc = load_part(gj[j] + c, end - c);
                for (int64_t i = 0; i < m; ++i) {
                    acc += splat(h[i * ldh + rank[j]]) * load_part(x[i] + c, end - c);
                }
                store_part(gj[j] + c, acc, end - c);
            }
        }
    }
}

}  // namespace
