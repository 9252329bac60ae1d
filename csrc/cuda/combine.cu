// See combine.cuh.
#include "cuda/combine.cuh"

#include "cuda/launch.cuh"
#include "cuda/routing.cuh"

namespace fedms {
namespace {

constexpr int kWarps = 8;

__global__ void __launch_bounds__(32 * kWarps) combine(const __grid_constant__ Combine call) {
    const Problem& p = call.problem;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Item item = item_at(p, blockIdx.x);
    const Expert& expert = expert_at(p, item.expert);
    for (int i = warp; i < kRows; i += kWarps) {  // a row is a whole warp's
        const std::int32_t row = place_in_group(p, item.group, item.tile * kRows + i).row;
        const Pair pair = pair_at(p, item.expert, row, item.column);
        if (pair.column < 0) continue;
        float product = 0.0f;
        for (int j = lane; j < expert.rank; j += 32) {
            const std::int64_t at = std::int64_t(row) * p.width + pair.column + j;
            float u = 0.0f;
            for (int k = 0; k < call.splits; ++k) u += call.partial[k * p.m * p.width + at];
            call.u[at] = u;
            if (call.h != nullptr) product += call.h[at] * u;
        }
        if (call.h == nullptr) continue;
        for (int bit = 16; bit > 0; bit /= 2) {
            product += __shfl_xor_sync(0xffffffffu, product, bit);
        }
        if (lane != 0) continue;
        const float dg = expert.scale * product;
        if (p.top_k < 0) {
            call.dg[std::int64_t(row) * p.num_experts + item.expert] = dg;
            continue;
        }
        for (std::int32_t slot = 0; slot < p.top_k; ++slot) {
            const std::int64_t at = std::int64_t(row) * p.top_k + slot;
            if (p.idxs[at] == item.expert) call.dg[at] = dg;
        }
    }
}

}  // namespace

Status launch_combine(const Combine& call, cudaStream_t stream) {
    const Problem& p = call.problem;
    const std::int64_t items =
        p.routes.num_groups < 0 ? ceil_div(p.m, kRows) * p.num_experts : p.routes.member_tiles;
    return launch("combine", combine, Grid{items, 1}, 32 * kWarps, stream, call);
}

}  // namespace fedms
