// Rows times the experts' A (or B), the first step of both directions:
//
//   forward    h[m, j] = sum over k of drop(x)[m, k] A[j, k]       in = x,  columns = K
//   backward   u[m, j] = sum over n of dy[m, n] B[n, j]            in = dy, columns = N
//
// A block takes a tile of kRows rows, a chunk of kRanks ranks of one expert and a slice of the
// columns (split-K: the slices' sums lie apart and are added in a fixed order by who reads them).
// Rows of one expert from many small segments share a tile. Every pair is computed by one block.
#pragma once

#include "cuda/problem.cuh"

namespace fedms {

struct Shrink {
    Problem problem;
    const void* in;  // [M, columns]
    float* out;      // [splits, M, width]
    std::int64_t columns;
    std::int64_t columns_per_split;  // a multiple of 512 bytes of in
    std::int32_t splits;
    std::int32_t from_b;  // 1: Bᵀ, 0: A with the problem's dropout
    DType dtype;          // of in
};

Status launch_shrink(const Shrink& call, cudaStream_t stream);

}  // namespace fedms
