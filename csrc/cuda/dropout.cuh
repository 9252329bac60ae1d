// The dropout mask of fedms/kernels/dropout.py (its docstring is the definition), on a device.
#pragma once

#include "cuda/routing.cuh"

namespace fedms {

__device__ inline std::uint64_t mix64(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The key of a row of an expert's mask. Any number for a row of -1.
__device__ inline std::uint64_t mask_key(const Problem& p, const Place& place,
                                         std::int32_t mask_expert) {
    const std::uint64_t seed = p.seeds[place.seed], expert = std::uint64_t(mask_expert + 1);
    const std::uint64_t row = std::uint64_t(place.row - place.mask_row + std::int64_t(1));
    return mix64(mix64(seed + expert * 0x9E3779B97F4A7C15ull) + row * 0xD1B54A32D192ED03ull);
}

// What the element of a row is multiplied by: 0 or 1 / (1 - p).
__device__ inline float mask(const Problem& p, std::uint64_t key, std::int64_t column) {
    std::uint32_t v = std::uint32_t(column) * 0x9E3779B1u + std::uint32_t(key);
    v = (v ^ (v >> 16)) * 0x7FEB352Du;
    v = ((v ^ (v >> 15)) ^ std::uint32_t(key >> 32)) * 0x846CA68Bu;
    return (v ^ (v >> 16)) >= p.threshold ? p.keep_scale : 0.0f;
}

}  // namespace fedms
