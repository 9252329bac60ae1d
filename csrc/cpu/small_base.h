// The frozen layer of a call so small that a GEMM library's own start takes longer than the work.
//
//   base_forward    y = x Wᵀ + bias
//   base_backward   dx = dy W
//
// W [N, K] row-major, in the rows' dtype; fp32 accumulation, one rounding.
#pragma once

#include "cpu/vec.h"

namespace {

using std::int64_t;

// Up to kWidth neighbouring outputs at once: their partial sums become the lanes of one vector.
template <class T>
void base_forward(const T* x, const T* weight, const T* bias, T* y, int64_t m, int64_t k,
                  int64_t n) {
    for (int64_t i = 0; i < m; ++i, x += k, y += n) {
        for (int64_t j = 0; j < n; j += kWidth) {
            const int64_t count = j + kWidth < n ? kWidth : n - j;
            const T* w[kWidth];
            Vec acc[kWidth];
            for (int v = 0; v < kWidth; ++v) {
                w[v] = weight + (v < count ? j + v : n - 1) * k;
                acc[v] = Vec{};
            }
            int64_t c = 0;
            for (; c + kWidth <= k; c += kWidth) {
                const Vec xv = load(x + c);
                for (int v = 0; v < kWidth; ++v) acc[v] += xv * load(w[v] + c);
            }
            if (c < k) {
                const Vec xv = load_part(x + c, k - c);
                for (int v = 0; v < kWidth; ++v) acc[v] += xv * load_part(w[v] + c, k - c);
            }
            Vec total = sums(acc);
            if (bias != nullptr) total += load_part(bias + j, count);
            store_part(y + j, total, count);
        }
    }
}

// Rows four at a time, to hide the latency of a multiply-add; the last ones repeat a row.
template <class T>
void base_backward(const T* dy, const T* weight, T* dx, int64_t m, int64_t k, int64_t n) {
    constexpr int kRows = 4;
    for (int64_t i0 = 0; i0 < m; i0 += kRows) {
        const T* from[kRows];
        T* to[kRows];
        for (int i = 0; i < kRows; ++i) {
            const int64_t row = i0 + i < m ? i0 + i : m - 1;
            from[i] = dy + row * n;
            to[i] = dx + row * k;
        }
        for (int64_t c = 0; c < k; c += kWidth) {
            const int64_t count = c + kWidth < k ? kWidth : k - c;
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

}  // namespace
