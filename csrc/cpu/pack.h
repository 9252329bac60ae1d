// The experts' stacked factors as the row kernels read them, in fp32.
//
//   panels  [ceil(R / width)][C][width]      one column of `width` ranks after the other
//   tiles   [ceil(C / tile)][height][tile]   `tile` columns of one rank after the other
//
// C is K for A and N for Bᵀ; what sticks out of C and R is zero. R C elements against the M C of
// the rows that they are multiplied with. Read again on every call: nothing is cached across calls.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fedms {

// E matrices stacked along their ranks; rank j of expert e, column c is at
// data[e][(j - ranks[e]) * by_rank(e) + c * by_column(e)].
struct Factor {
    const void* const* data;
    const std::int64_t* ranks;  // [E + 1]
    std::int64_t num_experts, columns;
    bool bf16;
    bool rank_major;  // A [r, K]; else B [N, r]
};

inline float widen(float x) {
    return x;
}

inline float widen(std::uint16_t bits) {
    const std::uint32_t u = static_cast<std::uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

// Calls f(j, source, stride) for every stacked rank j: its column c is source[c * stride].
template <class T, class F>
void for_each_rank(const Factor& factor, const F& f) {
    for (std::int64_t e = 0; e < factor.num_experts; ++e) {
        const std::int64_t r = factor.ranks[e + 1] - factor.ranks[e];
        const T* data = static_cast<const T*>(factor.data[e]);
        for (std::int64_t j = 0; j < r; ++j) {
            f(factor.ranks[e] + j, data + j * (factor.rank_major ? factor.columns : 1),
              factor.rank_major ? 1 : r);
        }
    }
}

// Columns [begin, end) of the panels.
template <class T>
void pack_panels(const Factor& factor, std::int64_t width, std::int64_t begin, std::int64_t end,
                 float* out) {
    const std::int64_t total = factor.ranks[factor.num_experts];
    // A few columns at a time, so that a line of the panels is filled while it is in the cache.
    constexpr std::int64_t kColumns = 64;
    for (std::int64_t c0 = begin; c0 < end; c0 += kColumns) {
        const std::int64_t stop = std::min(c0 + kColumns, end);
        for_each_rank<T>(factor, [&](std::int64_t j, const T* source, std::int64_t stride) {
            float* to = out + j / width * width * factor.columns + j % width;
            for (std::int64_t c = c0; c < stop; ++c) to[c * width] = widen(source[c * stride]);
        });
        for (std::int64_t j = total; j % width != 0; ++j) {
            float* to = out + j / width * width * factor.columns + j % width;
            for (std::int64_t c = c0; c < stop; ++c) to[c * width] = 0.0f;
        }
    }
}

// Tiles [begin, end) of so many ranks: R or more.
template <class T>
void pack_tiles(const Factor& factor, std::int64_t tile, std::int64_t height, std::int64_t begin,
                std::int64_t end, float* out) {
    const std::int64_t total = factor.ranks[factor.num_experts];
    for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t c0 = t * tile, n = std::min(tile, factor.columns - c0);
        for_each_rank<T>(factor, [&](std::int64_t j, const T* source, std::int64_t stride) {
            float* to = out + (t * height + j) * tile;
            for (std::int64_t c = 0; c < n; ++c) to[c] = widen(source[(c0 + c) * stride]);
            for (std::int64_t c = n; c < tile; ++c) to[c] = 0.0f;
        });
        std::fill(out + (t * height + total) * tile, out + (t + 1) * height * tile, 0.0f);
    }
}

}  // namespace fedms
