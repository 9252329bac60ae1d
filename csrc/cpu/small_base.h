// The frozen layer of a call with so few rows, or of such a small layer, that a GEMM library is slow
// to start or slow at it: every weight is read once.
//
//   base_forward    y = x Wᵀ + bias
//   base_backward   dx = dy W
//
// W [N, K] row-major, in the rows' dtype; fp32 accumulation, one rounding.
#pragma once

#include <type_traits>

#include "cpu/gated_lora.h"
#include "cpu/vec.h"

namespace {

using std::int64_t;

// Rows times kWidth / Rows outputs from `begin` on, whose sums become the lanes of one vector. What
// sticks out of the m rows or of `end` repeats the last one.
template <int Rows, class T>
void base_forward_tile(const T* x, const T* weight, const T* bias, T* y, int64_t m, int64_t k,
                       int64_t n, int64_t begin, int64_t end) {
    constexpr int kOutputs = kWidth / Rows;
    const T *xi[Rows], *wj[kOutputs];
    for (int i = 0; i < Rows; ++i) xi[i] = x + (i < m ? i : m - 1) * k;
    for (int j = 0; j < kOutputs; ++j) wj[j] = weight + (begin + j < end ? begin + j : end - 1) * k;
    Vec acc[kWidth] = {};
    const auto add = [&](const auto& at) {
        Vec xv[Rows];
        for (int i = 0; i < Rows; ++i) xv[i] = at(xi[i]);
        for (int j = 0; j < kOutputs; ++j) {
            const Vec wv = at(wj[j]);
            for (int i = 0; i < Rows; ++i) acc[j * Rows + i] += xv[i] * wv;
        }
    };
    int64_t c = 0;
    for (; c + kWidth <= k; c += kWidth) add([c](const T* p) { return load(p + c); });
    if (c < k) add([c, k](const T* p) { return load_part(p + c, k - c); });
    const Vec total = sums(acc);
    for (int j = 0; j < kOutputs && begin + j < end; ++j) {
        const int64_t at = begin + j;
        const float from = bias != nullptr ? load_part(bias + at, 1)[0] : 0.0f;
        for (int i = 0; i < Rows && i < m; ++i) {
            store_part(y + i * n + at, splat(total[j * Rows + i] + from), 1);
        }
    }
}

// Outputs [begin, end) of all rows, a few weights at a time: they are in the first-level cache for
// the second four rows.
template <class T>
void base_forward(const T* x, const T* weight, const T* bias, T* y, int64_t m, int64_t k, int64_t n,
                  int64_t begin, int64_t end) {
    const auto walk = [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        for (int64_t j = begin; j < end; j += kWidth / kRows) {
            for (int64_t i = 0; i < m; i += kRows) {
                base_forward_tile<kRows>(x + i * k, weight, bias, y + i * n, m - i, k, n, j, end);
            }
        }
    };
    if (m == 1) {
        walk(std::integral_constant<int, 1>{});
    } else if (m == 2) {
        walk(std::integral_constant<int, 2>{});
    } else {
        walk(std::integral_constant<int, 4>{});
    }
}

// Columns [begin, end) of all rows, four rows at a time; the last ones repeat a row.
template <class T>
void base_backward(const T* dy, const T* weight, T* dx, int64_t m, int64_t k, int64_t n,
                   int64_t begin, int64_t end) {
    constexpr int kRows = 4;
    for (int64_t i0 = 0; i0 < m; i0 += kRows) {
        const T* from[kRows];
        T* to[kRows];
        for (int i = 0; i < kRows; ++i) {
            const int64_t row = i0 + i < m ? i0 + i : m - 1;
            from[i] = dy + row * n;
            to[i] = dx + row * k;
        }
        for (int64_t c = begin; c < end; c += kWidth) {
            const int64_t count = c + kWidth < end ? kWidth : end - c;
            Vec acc[kRows] = {};
            for (int64_t j = 0; j < n; ++j) {
                const T* w = weight + j * k + c;
                const Vec wv = count == kWidth ? load(w) : load_part(w, count);
                for (int i = 0; i < kRows; ++i) acc[i] += splat(from[i][j]) * wv;
            }
            for (int i = 0; i < kRows; ++i) store_part(to[i] + c, acc[i], count);
        }
    }
}

template <class T>
void base_of(const fedms::Problem& p, int64_t begin, int64_t end) {
    const auto* weight = static_cast<const T*>(p.weight);
    if (p.dy == nullptr) {
        base_forward(static_cast<const T*>(p.x), weight, static_cast<const T*>(p.bias),
                     static_cast<T*>(p.y), p.m, p.k, p.n, begin, end);
    } else {
        base_backward(static_cast<const T*>(p.dy), weight, static_cast<T*>(p.dx), p.m, p.k, p.n,
                      begin, end);
    }
}

void base_columns(const fedms::Problem& p, int64_t begin, int64_t end) {
    p.bf16 ? base_of<bf16>(p, begin, end) : base_of<float>(p, begin, end);
}

}  // namespace
