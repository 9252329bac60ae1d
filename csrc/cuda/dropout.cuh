// The dropout mask of fedms/kernels/dropout.py (its docstring is the definition), on a device.
#pragma once

#include "cuda/problem.cuh"

namespace fedms {

__device__ inline std::uint64_t mix64(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The key of a row of an expert's mask.
__device__ inline std::uint64_t mask_key(const Problem& p, std::int32_t expert, std::int64_t row) {
    const std::uint64_t key = mix64(p.seed + std::uint64_t(expert + 1) * 0x9E3779B97F4A7C15ull);
    return mix64(key + std::uint64_t(row + 1) * 0xD1B54A32D192ED03ull);
}

// What the element of a row is multiplied by: 0 or 1 / (1 - p).
__device__ inline float mask(const Problem& p, std::uint64_t key, std::int64_t column) {
    std::uint32_t v = std::uint32_t(column) * 0x9E3779B1u + std::uint32_t(key);
    v = (v ^ (v >> 16)) * 0x7FEB352Du;
    v = ((v ^ (v >> 15)) ^ std::uint32_t(key >> 32)) * 0x846CA68Bu;
    return (v ^ (v >> 16)) >= p.threshold ? p.keep_scale : 0.0f;
}

}  // namespace fedms
