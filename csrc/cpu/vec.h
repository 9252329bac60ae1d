// One SIMD register of floats as a GCC/Clang vector type, with loads and stores for fp32 and bf16.
//
// Included only by gated_lora_rows.cpp, which is compiled once per instruction set: every function
// here has internal linkage, so that no copy for a wide machine can be picked by the linker for
// another.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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
typedef std::uint64_t VecL __attribute__((vector_size(kWidth * 4)));

FEDMS_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// To 16 bits and back: GCC 12 makes four and more instructions of __builtin_convertvector where
// AVX-512 has one (masked: of the plain ones it warns in its own header).
#if defined(__AVX512F__)
FEDMS_INLINE VecU widen(VecH h) {
    return (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
}

FEDMS_INLINE VecH narrow(VecU u) {
    return (VecH)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)u);
}
#else
FEDMS_INLINE VecU widen(VecH h) {
    return __builtin_convertvector(h, VecU);
}

FEDMS_INLINE VecH narrow(VecU u) {
    return __builtin_convertvector(u, VecH);
}
#endif

FEDMS_INLINE Vec load(const bf16* p) {
    VecH h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(widen(h) << 16);
}

FEDMS_INLINE void store(float* p, Vec v) {
    std::memcpy(p, &v, sizeof v);
}

// Round to nearest even; a NaN stays a NaN whatever its payload.
FEDMS_INLINE void store(bf16* p, Vec v) {
    const VecU u = (VecU)v;
    const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const VecH h = narrow(v == v ? rounded : VecU{} + 0x7fc0u);
    std::memcpy(p, &h, sizeof h);
}

// The first n < kWidth elements; the others are zero.
#if defined(__AVX512F__)
FEDMS_INLINE Vec load_part(const float* p, std::int64_t n) {
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}

FEDMS_INLINE Vec load_part(const bf16* p, std::int64_t n) {
    const __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p);
    return (Vec)(widen((VecH)h) << 16);
}
#else
template <class T>
FEDMS_INLINE Vec load_part(const T* p, std::int64_t n) {
    T buffer[kWidth];
    std::memset(buffer, 0, sizeof buffer);
    std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(T));
    return load(buffer);
}
#endif

template <class T>
FEDMS_INLINE void store_part(T* p, Vec v, std::int64_t n) {
    T buffer[kWidth];
    store(buffer, v);
    std::memcpy(p, buffer, static_cast<std::size_t>(n) * sizeof(T));
}

FEDMS_INLINE Vec splat(float x) {
    return x - Vec{};
}

// p[0] in the even lanes, p[1] in the odd ones.
FEDMS_INLINE Vec splat_pair(const float* p) {
    std::uint64_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Vec)(VecL{} + bits);
}

template <int First, int... I>
FEDMS_INLINE Vec every_second(Vec v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, Vec{}, (I < kWidth / 2 ? 2 * I + First : kWidth)...);
}

// Lane j: the sum of lanes 2 j and 2 j + 1; zero in the upper half.
FEDMS_INLINE Vec sums_of_pairs(Vec v) {
    constexpr auto lanes = std::make_integer_sequence<int, kWidth>{};
    return every_second<0>(v, lanes) + every_second<1>(v, lanes);
}

FEDMS_INLINE float to_float(float x) {
    return x;
}

FEDMS_INLINE float to_float(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

FEDMS_INLINE Vec splat(bf16 x) {
    return splat(to_float(x));
}

// Lanes of a and b whose index has bit `Half` clear (First) or set: a's stay together in the lower
// places of that bit, b's in the upper ones.
template <int Half, bool First, int... I>
FEDMS_INLINE Vec gather(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(
        a, b, ((I & Half) ? kWidth + I - (First ? Half : 0) : I + (First ? 0 : Half))...);
}

template <int Half, bool First>
FEDMS_INLINE Vec gather(Vec a, Vec b) {
    return gather<Half, First>(a, b, std::make_integer_sequence<int, kWidth>{});
}

// v[i][j] to v[j][i].
template <int Half = kWidth / 2>
FEDMS_INLINE void transpose(Vec* v) {
    for (int i = 0; i < kWidth; ++i) {
        if (i & Half) continue;
        const Vec a = v[i], b = v[i + Half];
        v[i] = gather<Half, true>(a, b);
        v[i + Half] = gather<Half, false>(a, b);
    }
    if constexpr (Half > 1) transpose<Half / 2>(v);
}

// The sums of kWidth vectors as the lanes of one. Summing each by itself would cost as much as 50
// columns of the product it ends.
template <int Half = kWidth / 2>
FEDMS_INLINE Vec sums(const Vec* v) {
    Vec next[Half];
    for (int i = 0; i < Half; ++i) {
        next[i] = gather<Half, true>(v[i], v[i + Half]) + gather<Half, false>(v[i], v[i + Half]);
    }
    if constexpr (Half == 1) {
        return next[0];
    } else {
        return sums<Half / 2>(next);
    }
}

}  // namespace
