// See shrink.cuh.
#include "cuda/shrink.cuh"

#include "cuda/dropout.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace fedms {
namespace {

constexpr int kWarps = 8;
constexpr int kOwn = kRows / kWarps;  // rows of a warp: warp, warp + kWarps, ...
constexpr int kSums = kOwn * kRanks;

// Lane l ends with the sums 2 l and 2 l + 1, in place of its first two. Each step keeps the half
// that a bit of the lane names: 62 exchanges instead of 5 for each of the 64 sums.
template <int kHalf>
__device__ inline void sum_over_lanes(float (&sums)[kSums], int lane) {
    constexpr int kBit = kHalf * 32 / kSums;
    const bool upper = lane & kBit;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
        const float give = upper ? sums[i] : sums[i + kHalf];
        const float keep = upper ? sums[i + kHalf] : sums[i];
        sums[i] = keep + __shfl_xor_sync(0xffffffffu, give, kBit);
    }
    if constexpr (kBit > 1) sum_over_lanes<kHalf / 2>(sums, lane);
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) shrink(const __grid_constant__ Shrink call) {
    constexpr int V = kVector<T>;
    struct Shared {
        Tile<V> tile;
        std::uint64_t keys[kRows];
        std::int32_t rows[kRows], columns[kRows];
    };
    FEDMS_SHARED(Shared, s);
    const Problem& p = call.problem;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const std::int64_t unit = blockIdx.x / p.chunks;
    const int first = int(blockIdx.x % p.chunks) * kRanks;
    const Item item = item_at(p, unit);
    const Expert& expert = expert_at(p, item.expert);
    const int ranks = min(expert.rank - first, kRanks);
    if (ranks <= 0) return;  // the whole block

    bool mine = false;
    if (threadIdx.x < kRows) {
        const Place place =
            place_in_group(p, item.group, item.tile * kRows + std::int64_t(threadIdx.x));
        const Pair pair = pair_at(p, item.expert, place.row, item.column);
        mine = pair.column >= 0;
        s.rows[threadIdx.x] = mine ? place.row : -1;
        s.columns[threadIdx.x] = pair.column;
        s.keys[threadIdx.x] = p.dropout ? mask_key(p, place, item.mask_expert) : 0;
    }
    if (!__syncthreads_or(mine)) return;

    const bool dropout = p.dropout && !call.from_b;
    const T* in = static_cast<const T*>(call.in);
    const bool vector = aligned(in, call.columns);
    const std::int64_t begin = blockIdx.y * call.columns_per_split;
    const std::int64_t end = min(begin + call.columns_per_split, call.columns);
    float sums[kSums] = {};  // [row of the warp][rank]

    for (std::int64_t c0 = begin; c0 < end; c0 += Tile<V>::kColumns) {
        const std::int64_t c = c0 + lane * V;
        Pack<T, V> packs[kOwn] = {};
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {  // before the barrier: both loads are then under way
            const std::int32_t row = s.rows[warp + i * kWarps];
            if (row >= 0) {
                packs[i] = load<V>(in + std::int64_t(row) * call.columns, c, call.columns, vector);
            }
        }
        s.tile.stage(p, expert, call.from_b, first, call.columns, c0);
        __syncthreads();
        float x[kOwn][V];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                x[i][v] = widen(packs[i].v[v]);
                if (dropout) x[i][v] *= mask(p, s.keys[warp + i * kWarps], c + v);
            }
        }
#pragma unroll
        for (int j = 0; j < kRanks; ++j) {
            if (j < ranks) {
                float a[V];
                s.tile.read(j, lane, a);
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
#pragma unroll
                    for (int v = 0; v < V; ++v) sums[i * kRanks + j] += x[i][v] * a[v];
                }
            }
        }
        __syncthreads();
    }

    sum_over_lanes<kSums / 2>(sums, lane);
    const int at = lane * 2, i = warp + at / kRanks * kWarps, j = at % kRanks;
    if (s.rows[i] < 0) return;
    float* out = call.out + (std::int64_t(blockIdx.y) * p.m + s.rows[i]) * p.width + s.columns[i];
    if (j < ranks) out[first + j] = sums[0];
    if (j + 1 < ranks) out[first + j + 1] = sums[1];
}

}  // namespace

Status launch_shrink(const Shrink& call, cudaStream_t stream) {
    const Problem& p = call.problem;
    const std::int64_t tiles =
        p.routes.num_groups < 0 ? ceil_div(p.m, kRows) * p.num_experts : p.routes.member_tiles;
    const Grid grid{tiles * p.chunks, call.splits};
    return by_dtype(call.dtype, [&](auto element) {
        const auto kernel = shrink<typename decltype(element)::type>;
        return launch("shrink", kernel, grid, 32 * kWarps, stream, call);
    });
}

}  // namespace fedms
