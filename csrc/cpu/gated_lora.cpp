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

#include "isa.h"
#include "parallel.h"

namespace fedms {
namespace {

using std::int64_t;

// Rows a block. Measured for R = 8 to 64 and K, N = 768, 3072: flat in the forward; in the backward
// small blocks move the partial gradients [R, K + N] too often (R = 64: 17.9 ms at 12 rows, 14.0 at
// 96), large ones drop dy out of the second-level cache before its second use (R = 16: 3.6 ms at
// 36, 4.7 at 192).
constexpr int64_t kBlock = 48, kLargestBlock = 96;
// Below this many multiply-adds a second thread costs more than it gives.
constexpr int64_t kSerialWork = 300'000;

int64_t align64(int64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

// One allocation, cut into aligned arrays.
class Arena {
  public:
    template <class T>
    int64_t reserve(int64_t count) {
        const int64_t at = size_;
        size_ += align64(count * static_cast<int64_t>(sizeof(T)));
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

int64_t block_rows(const Problem& p) {
    const int64_t rows = std::clamp<int64_t>(p.ranks[p.num_experts] * 3 / 2, kBlock, kLargestBlock);
    return std::min(rows, std::max<int64_t>(p.m, 1));
}

void prepare(Chunks& chunks, const Problem& p, int64_t threads, bool backward) {
    const int64_t ranks = p.ranks[p.num_experts];
    const int64_t work = p.m * ranks * (p.k + p.n) * (backward ? 2 : 1);
    chunks.m = p.m;
    chunks.count =
        work < kSerialWork ? 1 : std::clamp<int64_t>(threads, 1, std::max<int64_t>(p.m, 1));
    const int64_t block = block_rows(p);
    const int64_t pairs = p.idxs != nullptr ? block * p.top_k : 0;

    Arena& arena = chunks.arena;
    std::vector<int64_t> at;
    for (int64_t i = 0; i < chunks.count; ++i) {
        at.push_back(arena.reserve<float>(block * ranks));
        at.push_back(arena.reserve<float>(backward ? block * ranks : 0));
        at.push_back(arena.reserve<float>(p.dropout_p > 0.0 ? block * p.k : 0));
        at.push_back(arena.reserve<float>(backward ? ranks * p.k : 0));
        at.push_back(arena.reserve<float>(backward ? ranks * p.n : 0));
        at.push_back(arena.reserve<bool>(2 * p.num_experts));
        at.push_back(arena.reserve<void*>(4 * block));
        at.push_back(arena.reserve<int64_t>(pairs));
        at.push_back(arena.reserve<int64_t>(pairs));
        at.push_back(arena.reserve<int64_t>(p.num_experts + 1));
    }
    arena.allocate();
    for (int64_t i = 0; i < chunks.count; ++i) {
        const int64_t* o = at.data() + 10 * i;
        bool* touched = arena.get<bool>(o[5]);
        std::memset(touched, 0, static_cast<std::size_t>(2 * p.num_experts));
        chunks.scratch.push_back(
            Scratch{arena.get<float>(o[0]), arena.get<float>(o[1]), arena.get<float>(o[2]),
                    arena.get<float>(o[3]), arena.get<float>(o[4]), touched,
                    touched + p.num_experts, arena.get<const void*>(o[6]), arena.get<int64_t>(o[7]),
                    arena.get<int64_t>(o[8]), arena.get<int64_t>(o[9]), block});
    }
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

// One expert's gradient from the chunks' partials, columns [begin, end). Partials are [r, columns];
// dA is stored like them, dB transposed.
void reduce(const Chunks& chunks, const Problem& p, int64_t e, bool is_a, int64_t begin,
            int64_t end, void* out, bool bf16) {
    const int64_t columns = is_a ? p.k : p.n;
    const int64_t r0 = p.ranks[e], r = p.ranks[e + 1] - r0;
    constexpr int64_t kTile = 64;
    float total[kTile];
    for (int64_t c0 = begin; c0 < end; c0 += kTile) {
        const int64_t width = std::min(kTile, end - c0);
        for (int64_t j = 0; j < r; ++j) {
            std::fill(total, total + kTile, 0.0f);
            for (const Scratch& s : chunks.scratch) {
                if (!(is_a ? s.da_touched : s.db_touched)[e]) continue;
                const float* part = (is_a ? s.da : s.db) + (r0 + j) * columns + c0;
                for (int64_t c = 0; c < width; ++c) total[c] += part[c];
            }
            for (int64_t c = 0; c < width; ++c) {
                put(out, is_a ? j * columns + c0 + c : (c0 + c) * r + j, total[c], bf16);
            }
        }
    }
}

// A compiled graph runs no Python check, and an index out of range would write anywhere.
void check_indices(const Problem& p) {
    for (int64_t i = 0; p.idxs != nullptr && i < p.m * p.top_k; ++i) {
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
    prepare(chunks, p, threads, false);
    const RowKernels* rows = rows_slot();
    parallel_for(chunks.count, [&](int64_t i) {
        rows->forward(p, chunks.scratch[i], chunks.begin(i), chunks.begin(i + 1));
    });
}

void backward(const Problem& p, int64_t threads, void* const* da_out, void* const* db_out,
              bool grads_bf16) {
    check_indices(p);
    Chunks chunks;
    prepare(chunks, p, threads, true);
    const RowKernels* rows = rows_slot();
    parallel_for(chunks.count, [&](int64_t i) {
        rows->backward(p, chunks.scratch[i], chunks.begin(i), chunks.begin(i + 1));
    });
    // By columns, so that each part is written by one thread.
    const int64_t parts = chunks.count;
    parallel_for(parts, [&](int64_t i) {
        for (int64_t e = 0; e < p.num_experts; ++e) {
            if (p.want_da[e]) {
                reduce(chunks, p, e, true, p.k * i / parts, p.k * (i + 1) / parts, da_out[e],
                       grads_bf16);
            }
            if (p.want_db[e]) {
                reduce(chunks, p, e, false, p.n * i / parts, p.n * (i + 1) / parts, db_out[e],
                       grads_bf16);
            }
        }
    });
}

}  // namespace fedms
