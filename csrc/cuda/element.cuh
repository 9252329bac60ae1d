// Elements of the three dtypes as floats: widening, rounding to nearest even, packs of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/problem.cuh"

namespace fedms {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float widen(float v) {
    return v;
}
__device__ inline float widen(bf16 v) {
    return __bfloat162float(v);
}
__device__ inline float widen(f16 v) {
    return __half2float(v);
}
__device__ inline void narrow(float v, float& out) {
    out = v;
}
__device__ inline void narrow(float v, bf16& out) {
    out = __float2bfloat16_rn(v);
}
__device__ inline void narrow(float v, f16& out) {
    out = __float2half_rn(v);
}

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of a 16-byte load

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
    T v[V];
};

// True when every row of a matrix whose rows are `stride` elements apart can be read in 16 bytes.
template <class T>
__device__ inline bool aligned(const T* matrix, std::int64_t stride) {
    return ((reinterpret_cast<std::uintptr_t>(matrix) | std::uintptr_t(stride * sizeof(T))) & 15) ==
           0;
}

// Elements [c, c + V) of a row of `columns`; zeros behind its end.
template <int V, class T>
__device__ inline Pack<T, V> load(const T* row, std::int64_t c, std::int64_t columns, bool vector) {
    if (vector && c + V <= columns) return *reinterpret_cast<const Pack<T, V>*>(row + c);
    Pack<T, V> out;
    for (int v = 0; v < V; ++v) {
        if (c + v < columns) {
            out.v[v] = row[c + v];
        } else {
            narrow(0.0f, out.v[v]);
        }
    }
    return out;
}

template <int V, class T>
__device__ inline void store(T* row, std::int64_t c, std::int64_t columns, bool vector,
                             const Pack<T, V>& values) {
    if (vector && c + V <= columns) {
        *reinterpret_cast<Pack<T, V>*>(row + c) = values;
        return;
    }
    for (int v = 0; v < V; ++v) {
        if (c + v < columns) row[c + v] = values.v[v];
    }
}

__device__ inline float read(const void* base, DType dtype, std::int64_t at) {
    switch (dtype) {
        case DType::bf16:
            return widen(static_cast<const bf16*>(base)[at]);
        case DType::f16:
            return widen(static_cast<const f16*>(base)[at]);
        default:
            return static_cast<const float*>(base)[at];
    }
}

__device__ inline void write(void* base, DType dtype, std::int64_t at, float value) {
    switch (dtype) {
        case DType::bf16:
            return narrow(value, static_cast<bf16*>(base)[at]);
        case DType::f16:
            return narrow(value, static_cast<f16*>(base)[at]);
        default:
            static_cast<float*>(base)[at] = value;
    }
}

}  // namespace fedms
