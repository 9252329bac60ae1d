// Products of few rows, whose cost is reading the weights: every weight is read once.
//
//   few_rows        y = x Wᵀ + bias + sum over e of h~_e B_eᵀ,  h~_e = (x A_eᵀ) * gate * scale
//   base_backward   dx = dy W, of a layer so small that a GEMM library is slow to start
//
// Row-major throughout, so W [N, K], A [r, K] and B [N, r] are all walked along their rows, as they
// are: nothing is packed. fp32 accumulation, one rounding.
#pragma once

#include <type_traits>

#include "cpu/gated_lora.h"
#include "cpu/vec.h"

namespace {

using std::int64_t;

// Rows times kWidth / Rows dot products of `left` with rows `begin`, ... of `right`, whose sums
// become the lanes of one vector; put(i, j, sum) takes each. What sticks out of the m rows or of
// `end` repeats the last one.
template <int Rows, class L, class R, class Put>
void dot_tile_of(const L* left, int64_t left_stride, const R* right, int64_t m, int64_t k,
                 int64_t begin, int64_t end, const Put& put) {
    constexpr int kOutputs = kWidth / Rows;
    const L* xi[Rows];
    const R* wj[kOutputs];
    for (int i = 0; i < Rows; ++i) xi[i] = left + (i < m ? i : m - 1) * left_stride;
    for (int j = 0; j < kOutputs; ++j) wj[j] = right + (begin + j < end ? begin + j : end - 1) * k;
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
    for (; c + kWidth <= k; c += kWidth) add([c](const auto* p) { return load(p + c); });
    if (c < k) add([c, k](const auto* p) { return load_part(p + c, k - c); });
    const Vec total = sums(acc);
    for (int j = 0; j < kOutputs && begin + j < end; ++j) {
        for (int i = 0; i < Rows && i < m; ++i) put(i, begin + j, total[j * Rows + i]);
    }
}

// put(i, j, <left row i, right row j>) for all m rows and j in [begin, end), a few rows of `right`
// at a time: they are in the first-level cache for the second four rows of `left`.
template <class L, class R, class Put>
void dot_rows(const L* left, int64_t left_stride, const R* right, int64_t m, int64_t k,
              int64_t begin, int64_t end, const Put& put) {
    const auto walk = [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        for (int64_t j = begin; j < end; j += kWidth / kRows) {
            const int64_t stop = j + kWidth / kRows < end ? j + kWidth / kRows : end;
            for (int64_t i0 = 0; i0 < m; i0 += kRows) {
                dot_tile_of<kRows>(
                    left + i0 * left_stride, left_stride, right, m - i0, k, j, stop,
                    [&](int64_t i, int64_t column, float sum) { put(i0 + i, column, sum); });
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

// h~ [M, R] of stacked ranks [begin, end).
template <class T, class Adapter>
void few_shrink(const fedms::Problem& p, float* h, int64_t begin, int64_t end) {
    const int64_t all = p.ranks[p.num_experts];
    for (int64_t e = 0; e < p.num_experts; ++e) {
        const int64_t r0 = p.ranks[e], first = begin > r0 ? begin : r0;
        const int64_t last = end < p.ranks[e + 1] ? end : p.ranks[e + 1];
        if (first >= last) continue;
        dot_rows(static_cast<const T*>(p.x), p.k, static_cast<const Adapter*>(p.a[e]), p.m, p.k,
                 first - r0, last - r0, [&](int64_t i, int64_t j, float sum) {
                     const float gate =
                         p.gates != nullptr ? p.gates[i * p.gate_row + e * p.gate_col] : 1.0f;
                     h[i * all + r0 + j] = sum * (p.scale[e] * gate);
                 });
    }
}

// delta [M, N] += h~_e B_eᵀ, columns [begin, end). kWidth of them at a time become the lanes of
// vectors, one a rank, that serve all rows.
template <class Adapter>
void few_add_expert(const fedms::Problem& p, int64_t e, const float* h, float* delta, int64_t begin,
                    int64_t end) {
    const int64_t all = p.ranks[p.num_experts], r0 = p.ranks[e], r = p.ranks[e + 1] - r0;
    const Adapter* b = static_cast<const Adapter*>(p.b[e]);
    for (int64_t n0 = begin; n0 < end; n0 += kWidth) {
        const int64_t columns = n0 + kWidth < end ? kWidth : end - n0;
        for (int64_t j0 = 0; j0 < r; j0 += kWidth) {
            const int64_t ranks = j0 + kWidth < r ? kWidth : r - j0;
            Vec bt[kWidth];
            for (int c = 0; c < kWidth; ++c) {
                const Adapter* row = b + (n0 + (c < columns ? c : columns - 1)) * r + j0;
                bt[c] = ranks == kWidth ? load(row) : load_part(row, ranks);
            }
            transpose(bt);
            for (int64_t i = 0; i < p.m; ++i) {
                float* to = delta + i * p.n + n0;
                Vec acc = columns == kWidth ? load(to) : load_part(to, columns);
                for (int64_t j = 0; j < ranks; ++j) acc += splat(h[i * all + r0 + j0 + j]) * bt[j];
                columns == kWidth ? store(to, acc) : store_part(to, acc, columns);
            }
        }
    }
}

// Columns [begin, end) of y. delta [M, N]: memory for h~ Bᵀ. True where that is zero everywhere.
template <class T, class Adapter>
bool few_expand(const fedms::Problem& p, const float* h, float* delta, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < p.m; ++i) {
        std::memset(delta + i * p.n + begin, 0,
                    static_cast<std::size_t>(end - begin) * sizeof(float));
    }
    for (int64_t e = 0; e < p.num_experts; ++e) {
        few_add_expert<Adapter>(p, e, h, delta, begin, end);
    }
    bool zero = true;
    const T* bias = static_cast<const T*>(p.bias);
    T* y = static_cast<T*>(p.y);
    dot_rows(static_cast<const T*>(p.x), p.k, static_cast<const T*>(p.weight), p.m, p.k, begin, end,
             [&](int64_t i, int64_t j, float sum) {
                 const float add = delta[i * p.n + j];
                 zero &= add == 0.0f;
                 const float from = bias != nullptr ? to_float(bias[j]) : 0.0f;
                 store_part(y + i * p.n + j, splat(sum + from + add), 1);
             });
    return zero;
}

template <class T>
struct Type {
    using type = T;
};

// Calls f with the rows' and the adapters' type.
template <class F>
auto with_types(const fedms::Problem& p, const F& f) {
    const auto with = [&](auto rows) {
        return p.adapters_bf16 ? f(rows, Type<bf16>{}) : f(rows, Type<float>{});
    };
    return p.bf16 ? with(Type<bf16>{}) : with(Type<float>{});
}

void few_shrink_ranks(const fedms::Problem& p, float* h, int64_t begin, int64_t end) {
    with_types(p, [&](auto rows, auto adapter) {
        few_shrink<typename decltype(rows)::type, typename decltype(adapter)::type>(p, h, begin,
                                                                                    end);
    });
}

bool few_expand_columns(const fedms::Problem& p, const float* h, float* delta, int64_t begin,
                        int64_t end) {
    return with_types(p, [&](auto rows, auto adapter) {
        return few_expand<typename decltype(rows)::type, typename decltype(adapter)::type>(
            p, h, delta, begin, end);
    });
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

void base_backward_columns(const fedms::Problem& p, int64_t begin, int64_t end) {
    with_types(p, [&](auto rows, auto) {
        using T = typename decltype(rows)::type;
        base_backward(static_cast<const T*>(p.dy), static_cast<const T*>(p.weight),
                      static_cast<T*>(p.dx), p.m, p.k, p.n, begin, end);
    });
}

}  // namespace
