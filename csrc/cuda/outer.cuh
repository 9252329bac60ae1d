// The experts' gradients, sums over rows:
//
//   dA[j, k] = sum over m of coef(m, e(j)) u[m, j] drop(x)[m, k]     in = x,  columns = K
//   dB[n, j] = sum over m of coef(m, e(j)) h[m, j] dy[m, n]          in = dy, columns = N
//
// A block takes a chunk of kRanks ranks of one expert, a strip of columns and a slice of the
// expert's rows. One slice: the gradient is written at once, with one rounding. Several: their
// sums lie apart and outer_sum adds them in a fixed order. Frozen experts' blocks return at once.
#pragma once

#include "cuda/problem.cuh"

namespace fedms {

struct Outer {
    Problem problem;
    const void* in;      // [M, columns]
    const float* ranks;  // [M, width], u or h
    float* partial;      // [splits, R, columns]; null with one split
    std::int64_t columns;
    std::int64_t total_ranks;  // R
    std::int32_t splits;
    std::int32_t to_b;  // 1: dB, 0: dA with the problem's dropout
    DType dtype;        // of in
};

Status launch_outer(const Outer& call, cudaStream_t stream);

}  // namespace fedms
