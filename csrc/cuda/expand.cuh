// Expand from the experts' ranks, the second step of both directions:
//
//   forward    y[m, n] = from + sum over j of coef(m, e(j)) h[m, j] B[n, j]          columns = N
//   backward   dx[m, k] = from + undrop(sum over j of coef(m, e(j)) u[m, j] A[j, k]) columns = K
//
// with coef = gate * scale. A block owns a tile of kRows rows that use the same experts and a strip
// of columns; it sums all of their experts in fp32 and rounds once. A split shrink is added up
// here, so that a decoding step is two launches.
#pragma once

#include "cuda/problem.cuh"

namespace fedms {

struct Expand {
    Problem problem;
    const float* h;  // [splits, M, width], from shrink
    float* sum;      // null, or [M, width]: h summed over the splits, for the backward pass
    const void* from;  // what is added to, [M, columns] or [columns]; null: zeros
    void* out;         // [M, columns], may be `from`; rows without experts are not written
    std::int64_t columns;
    std::int32_t splits;
    std::int32_t from_rows;  // 1: from has M rows, 0: one for all
    std::int32_t from_b;  // 1: Bᵀ, 0: A with the problem's dropout undone
    std::int32_t narrow;  // 1: strips of 64 columns, so that few rows fill the device
    DType dtype;          // of out
};

Status launch_expand(const Expand& call, cudaStream_t stream);

}  // namespace fedms
