// What a call of the gated LoRA op is, as the kernels see it: experts, routing, dropout.
//
// Everything is passed by value in the launch's parameters, apart from tables that do not fit there
// (more than kInline experts, segments): those are device memory that the caller filled before
// (upload.cu). Offsets into matrices are 64-bit; row numbers and table entries 32-bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fedms {

constexpr int kRows = 32;    // rows of a tile
constexpr int kRanks = 16;   // ranks of a chunk: an expert of rank r is ceil(r / 16) of them
constexpr int kInline = 32;  // experts that travel in the launch's parameters

enum class DType : std::int32_t { f32, bf16, f16 };

struct Expert {
    const void* a;        // [rank, K]
    const void* b;        // [N, rank]
    void* da;             // like a; null: not wanted
    void* db;             // like b; null: not wanted
    float scale;          //
    std::int32_t rank;    //
    std::int32_t offset;  // sum of the ranks before it
    std::int32_t unused;  // the table is copied in 8-byte words
};

// Rows that use the same experts, from however many segments. A tile is kRows of its positions.
struct Group {
    std::int32_t tiles_before, rows, first_range, last_range, first_member, last_member;
};

// An expert of a group. Its h is at `column` of the group's rows.
struct Member {
    std::int32_t tiles_before, group, expert, column, mask_expert;
};

// All rows of an expert, from all of its groups.
struct RowSet {
    std::int32_t rows, first_range, last_range;
};

// Positions from `position` on (in a group or a row set) are the rows from `row` on. `column` is
// the expert's in that group; of a row set's ranges only, as is mask_expert. The dropout mask of a
// row and an expert is that of seeds[seed], row - mask_row and the member's mask_expert.
struct Range {
    std::int32_t position, row, column, seed, mask_row, mask_expert;
};

// Segments as tables. num_groups < 0: no segments, every row may use every expert.
struct Routes {
    const Group* groups;
    const Member* members;
    const RowSet* row_sets;  // [num_experts]
    const Range* ranges;
    std::int32_t num_groups, num_members, group_tiles, member_tiles;
};

struct Problem {
    Expert inlined[kInline];
    const Expert* table;       // null: inlined
    const void* gates;         // null (ones), else the gate of (m, e), or with idxs of (m, slot),
    std::int64_t gate_row;     // is at m * gate_row + e * gate_col
    std::int64_t gate_col;     //
    const std::int64_t* idxs;  // [M, top_k]: the experts of a row
    Routes routes;
    const std::uint64_t* seeds;  // one, or with segments perhaps one each; null without dropout
    std::int64_t m;
    std::int32_t num_experts;
    std::int32_t chunks;      // of the expert with the largest rank
    std::int32_t width;       // of a row of h
    std::int32_t top_k;       // -1: no lists
    std::int32_t slot_width;  // with idxs, h of slot i is at i * slot_width
    std::int32_t dropout;     // 1: dropout_p > 0
    std::uint32_t threshold;  // an element is kept when its hash reaches it
    float keep_scale;         // 1 / (1 - p)
    DType adapter, gate;
};

// How a launch went, with what a message needs.
struct Status {
    const char* kernel;
    cudaError_t error;
    dim3 grid;
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace fedms
