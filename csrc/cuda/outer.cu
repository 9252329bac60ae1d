// See outer.cuh.
#include "cuda/outer.cuh"

#include "cuda/dropout.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace fedms {
namespace {

constexpr int kWarps = 4;
constexpr int kOwn = kRows / kWarps;  // rows of a warp: warp, warp + kWarps, ...
constexpr int kAhead = 4;             // rows a warp loads before it uses them

__device__ inline void write_gradient(const Outer& call, const Expert& expert, int rank,
                                      std::int64_t c, float value) {
    void* gradient = call.to_b ? expert.db : expert.da;
    const std::int64_t at = call.to_b ? c * expert.rank + rank : rank * call.columns + c;
    write(gradient, call.problem.adapter, at, value);
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) outer(const __grid_constant__ Outer call) {
    constexpr int V = kVector<T>;
    struct Shared {
        Tile<V> tile;
        alignas(16) float ranks[kRows][kRanks];
        std::uint64_t keys[kRows];
        float coefficients[kRows];
        std::int32_t rows[kRows], columns[kRows];
    };
    FEDMS_SHARED(Shared, s);
    const Problem& p = call.problem;
    const bool grouped = p.routes.num_groups >= 0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int split = int(blockIdx.x % call.splits);
    const std::int64_t unit = blockIdx.x / call.splits;
    const int first = int(unit % p.chunks) * kRanks;
    const std::int32_t e = std::int32_t(unit / p.chunks);
    const Expert& expert = expert_at(p, e);
    const int ranks = min(expert.rank - first, kRanks);
    if (ranks <= 0 || (call.to_b ? expert.db : expert.da) == nullptr) return;  // the whole block

    const std::int64_t rows = grouped ? p.routes.row_sets[e].rows : p.m;
    const std::int64_t tiles = (rows + kRows - 1) / kRows;
    const std::int64_t tiles_per_split = (tiles + call.splits - 1) / call.splits;
    const std::int64_t end = min(tiles, (split + 1) * tiles_per_split);
    const bool dropout = p.dropout && !call.to_b;
    const T* in = static_cast<const T*>(call.in);
    const bool vector = aligned(in, call.columns);
    const std::int64_t c0 = std::int64_t(blockIdx.y) * Tile<V>::kColumns, c = c0 + lane * V;
    float sums[kRanks][V] = {};

    for (std::int64_t tile = split * tiles_per_split; tile < end; ++tile) {
        if (threadIdx.x < kRows) {
            const std::int64_t position = tile * kRows + threadIdx.x;
            Place place{position < rows ? std::int32_t(position) : -1, expert.offset, 0, 0, e};
            if (grouped) {
                const RowSet& set = p.routes.row_sets[e];
                place = place_in(p, set.rows, set.first_range, set.last_range, position);
            }
            const Pair pair = pair_at(p, e, place.row, place.column);
            s.rows[threadIdx.x] = pair.column >= 0 ? place.row : -1;
            s.columns[threadIdx.x] = pair.column;
            s.coefficients[threadIdx.x] = pair.coefficient;
            s.keys[threadIdx.x] = dropout ? mask_key(p, place, place.mask_expert) : 0;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kRows * kRanks; i += 32 * kWarps) {
            const int j = i % kRanks, row = i / kRanks;
            float value = 0.0f;
            if (j < ranks && s.rows[row] >= 0) {
                value =
                    s.coefficients[row] *
                    call.ranks[std::int64_t(s.rows[row]) * p.width + s.columns[row] + first + j];
            }
            s.ranks[row][j] = value;
        }
        __syncthreads();
#pragma unroll
        for (int ahead = 0; ahead < kOwn; ahead += kAhead) {
            Pack<T, V> packs[kAhead] = {};
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const std::int32_t row = s.rows[warp + (ahead + i) * kWarps];
                if (row >= 0) {
                    packs[i] =
                        load<V>(in + std::int64_t(row) * call.columns, c, call.columns, vector);
                }
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int row = warp + (ahead + i) * kWarps;
                if (s.rows[row] < 0) continue;
                float x[V];
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    x[v] = widen(packs[i].v[v]);
                    if (dropout) x[v] *= mask(p, s.keys[row], c + v);
                }
#pragma unroll
                for (int j = 0; j < kRanks; j += 4) {
                    const auto q = *reinterpret_cast<const Pack<float, 4>*>(&s.ranks[row][j]);
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
#pragma unroll
                        for (int v = 0; v < V; ++v) sums[j + k][v] += q.v[k] * x[v];
                    }
                }
            }
        }
        __syncthreads();
    }

    for (int turn = 0; turn < kWarps; ++turn) {  // one warp after the other: a fixed order
        if (warp == turn) {
#pragma unroll
            for (int j = 0; j < kRanks; ++j) {
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    float& total = s.tile.values[j][Tile<V>::at(lane * V + v)];
                    total = turn == 0 ? sums[j][v] : total + sums[j][v];
                }
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < kRanks * Tile<V>::kColumns; i += 32 * kWarps) {
        // Neighbouring threads write neighbours in memory, in either layout.
        const int j = call.to_b ? i % kRanks : i / Tile<V>::kColumns;
        const int at = call.to_b ? i / kRanks : i % Tile<V>::kColumns;
        if (j >= ranks || c0 + at >= call.columns) continue;
        const float value = s.tile.values[j][Tile<V>::at(at)];
        if (call.partial == nullptr) {
            write_gradient(call, expert, first + j, c0 + at, value);
        } else {
            const std::int64_t rank = split * call.total_ranks + expert.offset + first + j;
            call.partial[rank * call.columns + c0 + at] = value;
        }
    }
}

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads) outer_sum(const __grid_constant__ Outer call) {
    const Problem& p = call.problem;
    const Expert& expert = expert_at(p, std::int32_t(blockIdx.x / p.chunks));
    const int first = int(blockIdx.x % p.chunks) * kRanks;
    const int ranks = min(expert.rank - first, kRanks);
    const std::int64_t c = std::int64_t(blockIdx.y) * kSumThreads + threadIdx.x;
    if ((call.to_b ? expert.db : expert.da) == nullptr || c >= call.columns) return;
    for (int j = 0; j < ranks; ++j) {
        const std::int64_t at = (std::int64_t(expert.offset) + first + j) * call.columns + c;
        float sum = 0.0f;
        for (int split = 0; split < call.splits; ++split) {
            sum += call.partial[split * call.total_ranks * call.columns + at];
        }
        write_gradient(call, expert, first + j, c, sum);
    }
}

template <class T>
Status dispatch(const Outer& call, cudaStream_t stream) {
    const std::int64_t units = std::int64_t(call.problem.num_experts) * call.problem.chunks;
    const Grid grid{units * call.splits, ceil_div(call.columns, Tile<kVector<T>>::kColumns)};
    const Status status = launch("outer", outer<T>, grid, 32 * kWarps, stream, call);
    if (status.error != cudaSuccess || call.partial == nullptr) return status;
    return launch("outer_sum", outer_sum, Grid{units, ceil_div(call.columns, kSumThreads)},
                  kSumThreads, stream, call);
}

}  // namespace

Status launch_outer(const Outer& call, cudaStream_t stream) {
    return by_dtype(call.dtype, [&](auto element) {
        return dispatch<typename decltype(element)::type>(call, stream);
    });
}

}  // namespace fedms
