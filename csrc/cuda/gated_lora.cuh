// The gated LoRA forward on a GPU, for few rows (decoding, small batches): two launches after the
// base GEMM, which stays cuBLAS's.
//
//   shrink   h[m, j] = coefficient(m, j) * sum over k of x[m, k] A[j, k]      one warp an element
//   expand   y[m, n] += sum over j of h[m, j] B[n, j]                         one thread an element
//
// M rows, K in, N out, R stacked ranks; x and y are fp32 or bf16, A, B, h and gates fp32, sums
// fp32. Not yet run on a GPU and in no plan: a kernel that has not passed there is not chosen.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fedms {

struct CudaForward {
    const void* x;       // [M, K]
    void* y;             // [M, N], holds the base result
    const float* a;      // [R, K]
    const float* b;      // [N, R]
    float* h;            // [M, R]
    const float* gates;  // null (ones), or the gate of (m, e) at m * gate_row + e * gate_col
    std::int64_t gate_row, gate_col;
    const std::int32_t* expert_of_rank;  // [R]
    const float* scale_of_rank;          // [R]
    std::int64_t m, k, n, r;
    bool bf16;
};

cudaError_t launch_gated_lora_forward(const CudaForward& call, cudaStream_t stream);

}  // namespace fedms
