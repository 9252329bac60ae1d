// Driver of the gated LoRA op: scratch memory, threads, and the reduction of the partial gradients.
//
// Rows are cut into one chunk a thread. Each chunk has its own partial dA and dB, added up in chunk
// order: no atomics, and two runs with the same number of threads agree to the bit.
#include "cpu/gated_lora.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/pack.h"
#include "isa.h"
#include "parallel.h"

namespace fedms {
namespace {

using std::int64_t;

// Rows a block: enough that packed factors and partial gradients, which pass the second-level cache
// once a block, are small traffic beside the rows; few enough that a strip of them stays there.
constexpr int64_t kBlock = 96;
// Below this many multiply-adds a second thread costs more than it gives.
constexpr int64_t kSerialWork = 300'000;

int64_t round_up(int64_t count, int64_t unit) {
    return (count + unit - 1) / unit * unit;
}

// One allocation, cut into aligned arrays.
class Arena {
  public:
    template <class T>
    int64_t reserve(int64_t count) {
        const int64_t at = size_;
        size_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return at;
    }
    void allocate() { memory_.reset(new char[static_cast<std::size_t>(size_ + 64)]); }
    template <class T>
    T* get(int64_t at) const {
        const auto base = reinterpret_cast<std::uintptr_t>(memory_.get());
        return reinterpret_cast<T*>((base + 63) / 64 * 64 + static_cast<std::uintptr_t>(at));
    }

  private:
    int64_t size_ = 0;
    std::unique_ptr<char[]> memory_;
};

struct Chunks {
    Arena arena;
    std::vector<Scratch> scratch;
    int64_t count, m;
    int64_t begin(int64_t i) const { return m * i / count; }
};

// Parts for so many multiply-adds: one a thread where there are enough.
int64_t parts_for(int64_t work, int64_t threads) {
    return work < kSerialWork ? 1 : std::max<int64_t>(threads, 1);
}

// Scratch of every chunk. The shared panels are those of A in a forward and of B in a backward.
void prepare(Chunks& chunks, const Problem& p, const RowKernels& rows, int64_t threads,
             bool backward) {
    const int64_t ranks = p.ranks[p.num_experts];
    const int64_t work = p.m * ranks * (p.k + p.n) * (backward ? 2 : 1);
    chunks.m = p.m;
    chunks.count = std::clamp<int64_t>(parts_for(work, threads), 1, std::max<int64_t>(p.m, 1));
    const int64_t block = std::min(kBlock, std::max<int64_t>(p.m, 1));
    const int64_t pairs = block * std::max<int64_t>(p.top_k, 0);
    const int64_t ld = round_up(ranks, rows.width);
    const int64_t k = round_up(p.k, rows.tile), n = round_up(p.n, rows.tile);
    const bool dropout = p.dropout_p > 0.0;

    Arena& arena = chunks.arena;
    const int64_t panels = arena.reserve<float>(ld * round_up(backward ? p.n : p.k, rows.width));
    const int64_t tiles = arena.reserve<float>(ranks * (backward ? k : n));
    constexpr int64_t kArrays = 13;
    std::vector<int64_t> at;
    at.reserve(static_cast<std::size_t>(kArrays * chunks.count));
    for (int64_t i = 0; i < chunks.count; ++i) {
        at.push_back(arena.reserve<float>(block * ld));
        at.push_back(arena.reserve<float>(backward ? block * ld : 0));
        at.push_back(arena.reserve<float>(backward || dropout ? block * ld : 0));
        at.push_back(arena.reserve<float>(p.bf16 ? rows.wide : 0));
        at.push_back(arena.reserve<float>(backward ? block * rows.tile : 0));
        at.push_back(arena.reserve<float>(dropout ? block * p.k : 0));
        at.push_back(arena.reserve<float>(backward ? ranks * k : 0));
        at.push_back(arena.reserve<float>(backward ? ranks * n : 0));
        at.push_back(arena.reserve<bool>(2 * p.num_experts));
        at.push_back(arena.reserve<void*>(4 * block));
        at.push_back(arena.reserve<int64_t>(pairs));
        at.push_back(arena.reserve<int64_t>(pairs));
        at.push_back(arena.reserve<int64_t>(p.num_experts + 1));
    }
    arena.allocate();
    for (int64_t i = 0; i < chunks.count; ++i) {
        const int64_t* o = at.data() + kArrays * i;
        Scratch s{};
        s.panels = arena.get<float>(panels), s.tiles = arena.get<float>(tiles);
        s.few = 2 * ranks <= rows.width;
        s.ld = ld, s.block = block;
        s.h = arena.get<float>(o[0]), s.u = arena.get<float>(o[1]);
        s.one = arena.get<float>(o[2]), s.wide = arena.get<float>(o[3]);
        s.copy = arena.get<float>(o[4]), s.dropped = arena.get<float>(o[5]);
        s.da = arena.get<float>(o[6]), s.db = arena.get<float>(o[7]);
        s.da_touched = arena.get<bool>(o[8]), s.db_touched = s.da_touched + p.num_experts;
        std::memset(s.da_touched, 0, static_cast<std::size_t>(2 * p.num_experts));
        s.rows = arena.get<const void*>(o[9]);
        s.pair_row = arena.get<int64_t>(o[10]), s.pair_slot = arena.get<int64_t>(o[11]);
        s.expert_begin = arena.get<int64_t>(o[12]);
        chunks.scratch.push_back(s);
    }
}

template <class T>
void pack_part(const Factor& to_rank, const Factor& from_rank, const RowKernels& rows,
               const Scratch& s, int64_t part, int64_t parts) {
    auto* panels = const_cast<float*>(s.panels);
    auto* tiles = const_cast<float*>(s.tiles);
    const auto share = [part, parts](int64_t count, const auto& f) {
        f(count * part / parts, count * (part + 1) / parts);
    };
    const auto tiles_of = [&](const Factor& factor, int64_t tile, int64_t height, float* out) {
        share(round_up(factor.columns, tile) / tile, [&](int64_t begin, int64_t end) {
            pack_tiles<T>(factor, tile, height, begin, end, out);
        });
    };
    if (s.few) {
        tiles_of(to_rank, rows.width, rows.width / 2, panels);
    } else {
        share(to_rank.columns, [&](int64_t begin, int64_t end) {
            pack_panels<T>(to_rank, rows.width, begin, end, panels);
        });
    }
    tiles_of(from_rank, rows.tile, from_rank.ranks[from_rank.num_experts], tiles);
}

// Packs the factors that all chunks read, each thread a range of columns.
void pack(const Chunks& chunks, const Problem& p, const RowKernels& rows, bool backward) {
    const Factor a{p.a, p.ranks, p.num_experts, p.k, p.adapters_bf16, true};
    const Factor b{p.b, p.ranks, p.num_experts, p.n, p.adapters_bf16, false};
    const Factor &to_rank = backward ? b : a, &from_rank = backward ? a : b;
    const Scratch& s = chunks.scratch[0];
    const int64_t parts = chunks.count;
    parallel_for(parts, [&](int64_t i) {
        p.adapters_bf16 ? pack_part<std::uint16_t>(to_rank, from_rank, rows, s, i, parts)
                        : pack_part<float>(to_rank, from_rank, rows, s, i, parts);
    });
}

std::uint16_t to_bf16(float x) {
    std::uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

void put(void* out, int64_t at, float value, bool bf16) {
    if (bf16) {
        static_cast<std::uint16_t*>(out)[at] = to_bf16(value);
    } else {
        static_cast<float*>(out)[at] = value;
    }
}

// One expert's gradient from the chunks' partials, tiles [begin, end). dA is stored as it is
// summed, dB transposed.
void outer_sum(const Chunks& chunks, const Problem& p, int64_t tile, int64_t e, bool is_a,
            int64_t begin, int64_t end, void* out) {
    const int64_t columns = is_a ? p.k : p.n, all = p.ranks[p.num_experts];
    const int64_t r0 = p.ranks[e], r = p.ranks[e + 1] - r0;
    std::vector<float> total(static_cast<std::size_t>(tile));
    for (int64_t t = begin; t < end; ++t) {
        const int64_t c0 = t * tile, width = std::min(tile, columns - c0);
        for (int64_t j = 0; j < r; ++j) {
            std::fill(total.begin(), total.end(), 0.0f);
            for (const Scratch& s : chunks.scratch) {
                if (!(is_a ? s.da_touched : s.db_touched)[e]) continue;
                const float* part = (is_a ? s.da : s.db) + (t * all + r0 + j) * tile;
                for (int64_t c = 0; c < width; ++c) total[c] += part[c];
            }
            for (int64_t c = 0; c < width; ++c) {
                put(out, is_a ? j * columns + c0 + c : (c0 + c) * r + j, total[c], p.adapters_bf16);
            }
        }
    }
}

// A compiled graph runs no Python check, and an index out of range would write anywhere.
void check_indices(const Problem& p) {
    for (int64_t i = 0; i < p.m * p.top_k; ++i) {
        if (p.idxs[i] < 0 || p.idxs[i] >= p.num_experts) {
            throw std::out_of_range("expert_idxs must be in [0, " + std::to_string(p.num_experts) +
                                    "), got " + std::to_string(p.idxs[i]));
        }
    }
}

}  // namespace

void forward(const Problem& p, int64_t threads) {
    check_indices(p);
    if (p.m == 0) return;
    Chunks chunks;
    const RowKernels& rows = *rows_slot();
    prepare(chunks, p, rows, threads, false);
    pack(chunks, p, rows, false);
    parallel_for(chunks.count, [&](int64_t i) {
        rows.forward(p, chunks.scratch[i], chunks.begin(i), chunks.begin(i + 1));
    });
}

bool forward_few(const Problem& p, int64_t threads) {
    if (p.m == 0) return false;
    const RowKernels& rows = *rows_slot();
    const int64_t ranks = p.ranks[p.num_experts];
    std::unique_ptr<float[]> memory(new float[static_cast<std::size_t>(p.m * (ranks + p.n))]);
    float *h = memory.get(), *delta = h + p.m * ranks;
    const int64_t shrinks = parts_for(p.m * p.k * ranks, threads);
    parallel_for(shrinks, [&](int64_t i) {
        rows.few_shrink(p, h, ranks * i / shrinks, ranks * (i + 1) / shrinks);
    });
    const int64_t parts = parts_for(p.m * p.n * (p.k + ranks), threads);
    std::unique_ptr<bool[]> zero(new bool[static_cast<std::size_t>(parts)]);
    parallel_for(parts, [&](int64_t i) {
        zero[i] = rows.few_expand(p, h, delta, p.n * i / parts, p.n * (i + 1) / parts);
    });
    return std::all_of(zero.get(), zero.get() + parts, [](bool part) { return part; });
}

void backward(const Problem& p, int64_t threads, void* const* da_out, void* const* db_out) {
    check_indices(p);
    Chunks chunks;
    const RowKernels& rows = *rows_slot();
    prepare(chunks, p, rows, threads, true);
    if (p.weight != nullptr && p.dx != nullptr) {
        const int64_t parts = parts_for(p.m * p.k * p.n, threads);
        parallel_for(parts, [&](int64_t i) {
            rows.base_backward(p, p.k * i / parts, p.k * (i + 1) / parts);
        });
    }
    pack(chunks, p, rows, true);
    parallel_for(chunks.count, [&](int64_t i) {
        rows.backward(p, chunks.scratch[i], chunks.begin(i), chunks.begin(i + 1));
    });
    // By tiles, so that each part is written by one thread.
    const int64_t parts = chunks.count;
    const int64_t a_tiles = round_up(p.k, rows.tile) / rows.tile;
    const int64_t b_tiles = round_up(p.n, rows.tile) / rows.tile;
    parallel_for(parts, [&](int64_t i) {
        for (int64_t e = 0; e < p.num_experts; ++e) {
            if (p.want_da[e]) {
                outer_sum(chunks, p, rows.tile, e, true, a_tiles * i / parts,
                       a_tiles * (i + 1) / parts, da_out[e]);
            }
            if (p.want_db[e]) {
                outer_sum(chunks, p, rows.tile, e, false, b_tiles * i / parts,
                       b_tiles * (i + 1) / parts, db_out[e]);
            }
        }
    });
}

}  // namespace fedms
