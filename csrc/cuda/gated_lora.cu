// See gated_lora.cuh. Offsets are 64-bit: M N passes 2^31 in real calls.
#include <cuda_bf16.h>

#include "cuda/gated_lora.cuh"

namespace fedms {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;      // warps a block in shrink
constexpr int kThreads = 256;  // threads a block in expand

__device__ float widen(float v) {
    return v;
}
__device__ float widen(__nv_bfloat16 v) {
    return __bfloat162float(v);
}
__device__ void narrow(float v, float* out) {
    *out = v;
}
__device__ void narrow(float v, __nv_bfloat16* out) {
    *out = __float2bfloat16_rn(v);
}

template <class T>
__global__ void shrink(CudaForward call) {
    const std::int64_t at = std::int64_t(blockIdx.x) * kWarps + threadIdx.y;
    if (at >= call.m * call.r) return;  // a whole warp leaves together
    const std::int64_t m = at / call.r, j = at % call.r;
    const T* x = static_cast<const T*>(call.x) + m * call.k;
    const float* a = call.a + j * call.k;
    float sum = 0.0f;
    for (std::int64_t k = threadIdx.x; k < call.k; k += kWarp) sum += widen(x[k]) * a[k];
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        sum += __shfl_down_sync(0xffffffffu, sum, lanes);
    }
    if (threadIdx.x != 0) return;
    float coefficient = call.scale_of_rank[j];
    if (call.gates != nullptr) {
        coefficient *= call.gates[m * call.gate_row + call.expert_of_rank[j] * call.gate_col];
    }
    call.h[at] = sum * coefficient;
}

template <class T>
__global__ void expand(CudaForward call) {
    const std::int64_t at = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= call.m * call.n) return;
    const std::int64_t m = at / call.n, n = at % call.n;
    const float* h = call.h + m * call.r;
    const float* b = call.b + n * call.r;
    T* y = static_cast<T*>(call.y) + at;
    float sum = widen(*y);
    for (std::int64_t j = 0; j < call.r; ++j) sum += h[j] * b[j];
    narrow(sum, y);
}

unsigned blocks(std::int64_t items, std::int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <class T>
cudaError_t launch(const CudaForward& call, cudaStream_t stream) {
    shrink<T><<<blocks(call.m * call.r, kWarps), dim3(kWarp, kWarps), 0, stream>>>(call);
    if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    expand<T><<<blocks(call.m * call.n, kThreads), kThreads, 0, stream>>>(call);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gated_lora_forward(const CudaForward& call, cudaStream_t stream) {
    if (call.m == 0 || call.n == 0 || call.r == 0) return cudaSuccess;
    return call.bf16 ? launch<__nv_bfloat16>(call, stream) : launch<float>(call, stream);
}

}  // namespace fedms
