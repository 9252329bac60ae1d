// A chunk of an expert's A or Bᵀ in shared memory: kRanks rows of 32 V columns as floats.
//
// A lane owns V neighbouring columns. Eight of them are two groups of four, held apart: a warp's
// 16-byte reads of either group then touch every bank once, and so do the column-wise writes of B.
#pragma once

#include "cuda/routing.cuh"

namespace fedms {

template <int V>
struct alignas(16) Tile {
    static constexpr int kColumns = 32 * V;
    static constexpr int kStride = kColumns + (V == 8 ? 16 : 4);
    float values[kRanks][kStride];

    __device__ static int at(int c) {
        if (V != 8) return c;
        return (c & 3) + (c >> 3) * 4 + (c & 4) * 36;
    }

    // The lane's V columns of a rank.
    __device__ void read(int rank, int lane, float (&out)[V]) const {
        constexpr int kStep = V < 4 ? V : 4;
        for (int v = 0; v < V; v += kStep) {
            const auto pack =
                *reinterpret_cast<const Pack<float, kStep>*>(&values[rank][at(lane * V + v)]);
            for (int i = 0; i < kStep; ++i) out[v + i] = pack.v[i];
        }
    }

    // Ranks [first, first + kRanks) of A [rank, columns], from column c0 on.
    template <class T>
    __device__ void stage_a(const T* a, int rank, int first, std::int64_t columns,
                            std::int64_t c0) {
        constexpr int kPacks = kColumns / kVector<T>;
        const bool vector = aligned(a, columns);
        for (int i = threadIdx.x; i < kRanks * kPacks; i += blockDim.x) {
            const int j = i / kPacks, c = i % kPacks * kVector<T>;
            if (first + j >= rank) continue;
            const auto pack =
                load<kVector<T>>(a + std::int64_t(first + j) * columns, c0 + c, columns, vector);
            for (int v = 0; v < kVector<T>; ++v) values[j][at(c + v)] = widen(pack.v[v]);
        }
    }

    // The same of Bᵀ from B [columns, rank]. Neighbouring threads take neighbouring columns.
    template <class T>
    __device__ void stage_b(const T* b, int rank, int first, std::int64_t columns,
                            std::int64_t c0) {
        constexpr int kPacks = kRanks / kVector<T>;
        const bool vector = aligned(b, rank);
        for (int i = threadIdx.x; i < kPacks * kColumns; i += blockDim.x) {
            const int j = i / kColumns * kVector<T>, c = i % kColumns;
            if (first + j >= rank) continue;
            Pack<T, kVector<T>> pack{};
            if (c0 + c < columns) {
                pack = load<kVector<T>>(b + (c0 + c) * rank, first + j, rank, vector);
            }
            for (int v = 0; v < kVector<T>; ++v) values[j + v][at(c)] = widen(pack.v[v]);
        }
    }

    // Rows past the rank are left as they were: nobody may read them.
    __device__ void stage(const Problem& p, const Expert& expert, bool from_b, int first,
                          std::int64_t columns, std::int64_t c0) {
        switch (p.adapter) {
            case DType::bf16:
                return stage_as<bf16>(expert, from_b, first, columns, c0);
            case DType::f16:
                return stage_as<f16>(expert, from_b, first, columns, c0);
            default:
                return stage_as<float>(expert, from_b, first, columns, c0);
        }
    }

    template <class T>
    __device__ void stage_as(const Expert& expert, bool from_b, int first, std::int64_t columns,
                             std::int64_t c0) {
        if (from_b) {
            stage_b(static_cast<const T*>(expert.b), expert.rank, first, columns, c0);
        } else {
            stage_a(static_cast<const T*>(expert.a), expert.rank, first, columns, c0);
        }
    }
};

}  // namespace fedms
