// Between the backward pass's shrink and what uses u: add up its splits, and
//
//   dg[m, e] = scale_e * sum over j of h[m, j] u[m, j]
//
// for every pair that exists; with idxs, for every slot that lists the expert.
#pragma once

#include "cuda/problem.cuh"

namespace fedms {

struct Combine {
    Problem problem;
    const float* partial;  // [splits, M, width], from shrink
    float* u;              // [M, width]; the partial itself with one split
    const float* h;        // [M, width]; null: no dg
    float* dg;             // [M, E] or [M, top_k], zeros
    std::int32_t splits;
};

Status launch_combine(const Combine& call, cudaStream_t stream);

}  // namespace fedms
