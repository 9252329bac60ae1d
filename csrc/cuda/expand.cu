// See expand.cuh.
#include "cuda/expand.cuh"

#include "cuda/dropout.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace fedms {
namespace {

constexpr int kWarps = 4;
constexpr int kOwn = kRows / kWarps;  // rows of a warp: warp, warp + kWarps, ...
constexpr int kStride = kRows + 4;    // of a rank in shared memory: no two ranks in one bank
constexpr int kElements = kRows * kRanks / (32 * kWarps);  // of a tile's h that a thread loads

// The row of a thread's i-th element. Neighbouring threads have neighbouring ranks.
__device__ inline int row_of(int i) {
    return (i * 32 * kWarps + int(threadIdx.x)) / kRanks;
}

// Where a row's coefficient times h is: the rows of a warp are neighbours, two 16-byte reads.
__device__ inline int slot_of(int row) {
    return row % kWarps * kOwn + row / kWarps;
}

template <int V>
struct Shared {
    Tile<V> tile;
    alignas(16) float h[kRanks][kStride];
    std::uint64_t keys[kRows];
    float coefficients[kRows];
    std::int32_t rows[kRows], columns[kRows];
    Place places[kRows];  // each its thread's own: in registers they would spill
};

// s.h: coefficient times h, summed over its splits, of ranks [first, first + ranks); zeros beside.
template <int V>
__device__ inline void stage_h(Shared<V>& s, const Expand& call, int first, int ranks) {
    const Problem& p = call.problem;
    const int j = threadIdx.x % kRanks;
    std::int64_t at[kElements];  // -1: not there
    float sums[kElements] = {};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
        const int row = row_of(i);
        const bool there = j < ranks && s.columns[row] >= 0;
        at[i] = there ? std::int64_t(s.rows[row]) * p.width + s.columns[row] + first + j : -1;
    }
    // Many loads under way at once: their latency is most of a decoding step's time. Eight splits
    // at once spill on sm_80.
#pragma unroll 4
    for (int split = 0; split < call.splits; ++split) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            if (at[i] >= 0) sums[i] += call.h[split * p.m * p.width + at[i]];
        }
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
        if (at[i] >= 0 && call.sum != nullptr && blockIdx.y == 0) call.sum[at[i]] = sums[i];
        const int row = row_of(i);
        s.h[j][slot_of(row)] = s.coefficients[row] * sums[i];
    }
}

// Selective: whether an expert's part is kept is decided for each element (dropout) or row (top-k).
template <class T, int V, bool Selective>
__global__ void __launch_bounds__(32 * kWarps) expand(const __grid_constant__ Expand call) {
    FEDMS_SHARED(Shared<V>, s);
    const Problem& p = call.problem;
    const bool grouped = p.routes.num_groups >= 0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const std::int64_t c0 = std::int64_t(blockIdx.y) * Tile<V>::kColumns, c = c0 + lane * V;
    std::int32_t group = 0, first_member = 0, last_member = p.num_experts;
    std::int64_t tile = blockIdx.x;
    if (grouped) {
        group = find(p.routes.groups, 0, p.routes.num_groups, &Group::tiles_before, tile);
        tile -= p.routes.groups[group].tiles_before;
        first_member = p.routes.groups[group].first_member;
        last_member = p.routes.groups[group].last_member;
    }
    if (threadIdx.x < kRows) {  // read by others behind a barrier: no group is without experts
        const Place place = place_in_group(p, group, tile * kRows + std::int64_t(threadIdx.x));
        s.places[threadIdx.x] = place;
        s.rows[threadIdx.x] = place.row;
    }
    float sums[kOwn][V] = {};

    for (std::int32_t m = first_member; m < last_member; ++m) {
        const std::int32_t e = grouped ? p.routes.members[m].expert : m;
        const Expert& expert = expert_at(p, e);
        bool mine = false;
        if (threadIdx.x < kRows) {
            const std::int32_t column = grouped ? p.routes.members[m].column : expert.offset;
            const Pair pair = pair_at(p, e, s.rows[threadIdx.x], column);
            mine = pair.column >= 0;
            s.columns[threadIdx.x] = pair.column;
            s.coefficients[threadIdx.x] = pair.coefficient;
            if (Selective && p.dropout) {
                const std::int32_t own = grouped ? p.routes.members[m].mask_expert : e;
                s.keys[threadIdx.x] = mask_key(p, s.places[threadIdx.x], own);
            }
        }
        if (!__syncthreads_or(mine)) continue;
        float part[kOwn][V] = {};

        for (int first = 0; first < expert.rank; first += kRanks) {
            const int ranks = min(expert.rank - first, kRanks);
            stage_h(s, call, first, ranks);
            s.tile.stage(p, expert, call.from_b, first, call.columns, c0);
            __syncthreads();
#pragma unroll
            for (int j = 0; j < kRanks; ++j) {
                if (j < ranks) {
                    Pack<float, 4> h[kOwn / 4];
#pragma unroll
                    for (int i = 0; i < kOwn / 4; ++i) {
                        h[i] =
                            *reinterpret_cast<const Pack<float, 4>*>(&s.h[j][warp * kOwn + 4 * i]);
                    }
                    float q[V];
                    s.tile.read(j, lane, q);
#pragma unroll
                    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
                        for (int v = 0; v < V; ++v) {
                            (Selective ? part : sums)[i][v] += h[i / 4].v[i % 4] * q[v];
                        }
                    }
                }
            }
            __syncthreads();
        }
        if (Selective) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const int row = warp + i * kWarps;
                if (s.columns[row] < 0) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const bool undrop = p.dropout && !call.from_b;
                    const float factor = undrop ? mask(p, s.keys[row], c + v) : 1.0f;
                    if (factor != 0.0f) sums[i][v] += factor * part[i][v];
                }
            }
        }
        __syncthreads();  // the next expert's pairs replace these
    }

    T* out = static_cast<T*>(call.out);
    const T* from = static_cast<const T*>(call.from);
    const bool vector = aligned(out, call.columns) && aligned(from, call.columns);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const std::int32_t row = s.rows[warp + i * kWarps];
        if (row < 0 || c >= call.columns) continue;
        const std::int64_t at = std::int64_t(row) * call.columns;
        if (from != nullptr) {
            const T* start_row = from + (call.from_rows ? at : 0);
            const Pack<T, V> start = load<V>(start_row, c, call.columns, vector);
#pragma unroll
            for (int v = 0; v < V; ++v) sums[i][v] += widen(start.v[v]);
        }
        Pack<T, V> values;
#pragma unroll
        for (int v = 0; v < V; ++v) narrow(sums[i][v], values.v[v]);
        store<V>(out + at, c, call.columns, vector, values);
    }
}

template <class T>
Status dispatch(const Expand& call, cudaStream_t stream) {
    const Problem& p = call.problem;
    const int columns = 32 * (call.narrow ? 2 : kVector<T>);
    const std::int64_t tiles =
        p.routes.num_groups < 0 ? ceil_div(p.m, kRows) : p.routes.group_tiles;
    const Grid grid{tiles, ceil_div(call.columns, columns)};
    const bool selective = p.top_k >= 0 || (p.dropout && !call.from_b);
    // Two columns a lane leave registers for the second set of sums: one kernel does for both.
    const auto kernel = call.narrow ? expand<T, 2, true>
                        : selective ? expand<T, kVector<T>, true>
                                    : expand<T, kVector<T>, false>;
    return launch("expand", kernel, grid, 32 * kWarps, stream, call);
}

}  // namespace

Status launch_expand(const Expand& call, cudaStream_t stream) {
    return by_dtype(call.dtype, [&](auto element) {
        return dispatch<typename decltype(element)::type>(call, stream);
    });
}

}  // namespace fedms
