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

// v as bf16 in the upper halves of the lanes, to nearest even; what is below means nothing. A NaN
// stays a NaN whatever its payload.
FEDMS_INLINE VecU rounded(Vec v) {
    const VecU u = (VecU)v;
    return v == v ? u + 0x7fffu + ((u >> 16) & 1u) : VecU{} + 0x7fc00000u;
}

FEDMS_INLINE void store(bf16* p, Vec v) {
    const VecH h = narrow(rounded(v) >> 16);
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

template <class F, int... I>
FEDMS_INLINE void each(const F& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}

// f(0), f(1), ... with constants: GCC 12 keeps an array that a loop walks in memory, even if it
// unrolls the loop.
template <int Count, class F>
FEDMS_INLINE void each(const F& f) {
    each(f, std::make_integer_sequence<int, Count>{});
}

// Count vectors side by side.
template <int Count, class T>
FEDMS_INLINE void load_all(const T* p, Vec (&v)[Count]) {
    each<Count>([&](auto i) { v[i] = load(p + i * kWidth); });
}

template <int Count, class T>
FEDMS_INLINE void store_all(T* p, const Vec (&v)[Count]) {
    each<Count>([&](auto i) { store(p + i * kWidth, v[i]); });
}

#if defined(__AVX512F__)
// f(0), f(1), ... as the words of a register.
template <class F>
FEDMS_INLINE __m512i words(const F& f) {
    short lanes[2 * kWidth];
    for (int i = 0; i < 2 * kWidth; ++i) lanes[i] = static_cast<short>(f(i));
    return _mm512_loadu_si512(lanes);
}

// Two vectors of bf16 are one register, and one permutation moves its words where they belong.
template <int Count>
FEDMS_INLINE void load_all(const bf16* p, Vec (&v)[Count]) {
    static_assert(Count % 2 == 0);
    constexpr __mmask32 kUpper = 0xaaaaaaaau;
    const __m512i first = words([](int i) { return i / 2; });
    const __m512i second = words([](int i) { return kWidth + i / 2; });
    each<Count / 2>([&](auto i) {
        const __m512i both = _mm512_loadu_si512(p + 2 * i * kWidth);
        v[2 * i] = (Vec)_mm512_maskz_permutexvar_epi16(kUpper, first, both);
        v[2 * i + 1] = (Vec)_mm512_maskz_permutexvar_epi16(kUpper, second, both);
    });
}

template <int Count>
FEDMS_INLINE void store_all(bf16* p, const Vec (&v)[Count]) {
    static_assert(Count % 2 == 0);
    const __m512i upper = words([](int i) { return 2 * i + 1; });
    each<Count / 2>([&](auto i) {
        const __m512i low = (__m512i)rounded(v[2 * i]), high = (__m512i)rounded(v[2 * i + 1]);
        _mm512_storeu_si512(p + 2 * i * kWidth, _mm512_permutex2var_epi16(low, upper, high));
    });
}
#endif

// Half a vector from each of two places, and back.
FEDMS_INLINE Vec join(const float* low, const float* high) {
    float both[kWidth];
    std::memcpy(both, low, sizeof both / 2);
    std::memcpy(both + kWidth / 2, high, sizeof both / 2);
    return load(both);
}

FEDMS_INLINE void split(Vec v, float* low, float* high) {
    float both[kWidth];
    store(both, v);
    std::memcpy(low, both, sizeof both / 2);
    std::memcpy(high, both + kWidth / 2, sizeof both / 2);
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
