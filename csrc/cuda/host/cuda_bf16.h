// bfloat16 for a C++ compiler: the upper half of a float, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
    std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
    const std::uint32_t bits = std::uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, sizeof(bits));
    if (v != v) return {0x7FFF};
    bits += 0x7FFF + ((bits >> 16) & 1);
    return {std::uint16_t(bits >> 16)};
}
