// The dropout mask as a function of (seed, expert, row, column).
//
// The definition is the docstring of fedms/kernels/dropout.py; this is the same arithmetic.
#pragma once

#include <cstdint>

namespace fedms {

static inline std::uint64_t mix64(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

static inline std::uint64_t expert_key(std::uint64_t seed, std::int64_t expert) {
    return mix64(seed + static_cast<std::uint64_t>(expert + 1) * 0x9E3779B97F4A7C15ull);
}

static inline std::uint64_t row_key(std::uint64_t key, std::int64_t row) {
    return mix64(key + static_cast<std::uint64_t>(row + 1) * 0xD1B54A32D192ED03ull);
}

static inline bool keep_element(std::uint32_t lo, std::uint32_t hi, std::uint32_t column,
                                std::uint32_t threshold) {
    std::uint32_t v = column * 0x9E3779B1u + lo;
    v = (v ^ (v >> 16)) * 0x7FEB352Du;
    v = ((v ^ (v >> 15)) ^ hi) * 0x846CA68Bu;
    return (v ^ (v >> 16)) >= threshold;
}

}  // namespace fedms
