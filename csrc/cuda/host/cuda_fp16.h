// IEEE half for a C++ compiler, rounded to nearest even.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    std::uint16_t bits;
};

inline float __half2float(__half v) {
    const int exponent = (v.bits >> 10) & 31, fraction = v.bits & 1023;
    float out = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(float(fraction), -24)
                                : std::ldexp(float(1024 + fraction), exponent - 25);
    return std::copysign(out, v.bits & 0x8000 ? -1.0f : 1.0f);
}

inline __half __float2half_rn(float v) {
    const std::uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    v = std::fabs(v);
    if (v != v) return {0x7FFF};
    if (v == 0.0f) return {sign};
    if (v >= 65520.0f) return {std::uint16_t(sign | 0x7C00)};
    int exponent = 0;
    std::frexp(v, &exponent);                       // v < 2^exponent
    const int unit = std::max(exponent, -13) - 11;  // of the last place; subnormals share one
    const int steps = int(std::nearbyint(std::ldexp(v, -unit)));
    // A carry out of the fraction lands in the exponent, as it should.
    if (exponent < -13) return {std::uint16_t(sign | steps)};
    return {std::uint16_t(sign | (((exponent + 14) << 10) + (steps - 1024)))};
}
