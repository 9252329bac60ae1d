// One SIMD register of floats as a GCC/Clang vector type, with loads and stores for fp32 and bf16.
//
// Included only by gated_lora_rows.cpp, which is compiled once per instruction set: every function
// here has internal linkage, so that no copy for a wide machine can be picked by the linker for
// another.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define FEDMS_INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

struct bf16 {
    std::uint16_t bits;
};

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef std::uint32_t VecU __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t VecH __attribute__((vector_size(kWidth * 2)));

FEDMS_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

FEDMS_INLINE Vec load(const bf16* p) {
    VecH h;
    std::memcpy(&h, p, sizeof h);
    VecU u = __builtin_convertvector(h, VecU) << 16;
    return (Vec)u;
}

FEDMS_INLINE void store(float* p, Vec v) {
    std::memcpy(p, &v, sizeof v);
}

// Round to nearest even; a NaN stays a NaN whatever its payload.
FEDMS_INLINE void store(bf16* p, Vec v) {
    VecU u = (VecU)v;
    VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    VecU is_nan = (VecU)((u & 0x7fffffffu) > 0x7f800000u);
    VecU bits = (is_nan & 0x7fc0u) | (~is_nan & rounded);
    VecH h = __builtin_convertvector(bits, VecH);
    std::memcpy(p, &h, sizeof h);
}

// The first n < kWidth elements; the others are zero.
template <class T>
FEDMS_INLINE Vec load_part(const T* p, std::int64_t n) {
    T buffer[kWidth];
    std::memset(buffer, 0, sizeof buffer);
    std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(T));
    return load(buffer);
}

template <class T>
FEDMS_INLINE void store_part(T* p, Vec v, std::int64_t n) {
    T buffer[kWidth];
    store(buffer, v);
    std::memcpy(p, buffer, static_cast<std::size_t>(n) * sizeof(T));
}

FEDMS_INLINE Vec splat(float x) {
    return x - Vec{};
}

FEDMS_INLINE Vec splat(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return splat(wide);
}

// Lane i of the result: where bit `Half` of i is clear a[i] + a[i + Half], else b[i] + b[i - Half].
template <int Half, int... I>
FEDMS_INLINE Vec fold(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, ((I & Half) ? kWidth + I : I)...) +
           __builtin_shufflevector(a, b, ((I & Half) ? kWidth + I - Half : I + Half)...);
}

// The sums of kWidth vectors as the lanes of one. Summing each by itself would cost as much as 50
// columns of the product it ends.
template <int Half = kWidth / 2>
FEDMS_INLINE Vec sums(const Vec* v) {
    Vec next[Half];
    for (int i = 0; i < Half; ++i) {
        next[i] = fold<Half>(v[i], v[i + Half], std::make_integer_sequence<int, kWidth>{});
    }
    if constexpr (Half == 1) {
        return next[0];
    } else {
        return sums<Half / 2>(next);
    }
}

}  // namespace
