// The gated LoRA op on raw pointers: what to compute, and the entry points.
//
//   forward   h = drop(x) Aᵀ;  h~ = h * expand(gate * scale);  y += h~ Bᵀ
//   backward  u = dy B;  u~ = u * expand(gate * scale);  dx += undrop(u~ A);
//             dB = dyᵀ h~;  dA = u~ᵀ drop(x);  dgate[m, e] = scale_e <h[m, e], u[m, e]>
//
// M rows, K in, N out, E experts, R stacked ranks. x, y, dy, dx share one dtype (fp32 or bf16);
// everything in between is fp32. Pairs (row, expert) exist by `runs` or by `idxs`, else all do.
#pragma once

#include <cstdint>

namespace fedms {

// Rows that all use the experts [first, last); their h begins at `column` of the rows of h, which
// hold only the ranks that a row uses. The dropout mask of a pair is that of row - mask_row and
// expert - first + mask_expert.
struct Run {
    std::int64_t row_begin, row_end, first, last, column, mask_row, mask_expert;
    std::uint64_t seed;
};

struct Problem {
    std::int64_t m, k, n, num_experts;
    bool bf16;                  // dtype of x, y, dy, dx
    const std::int64_t* ranks;  // [E + 1] offsets of the experts' ranks in 0..R
    const void* const* a;       // [E] A_e [r_e, K]
    const void* const* b;       // [E] B_e [N, r_e]
    bool adapters_bf16;         // dtype of a, b and their gradients
    const float* scale;         // [E]
    // gate of (m, e) at gates[m * gate_row + e * gate_col]; with idxs, of (m, j) likewise
    const float* gates;  // null: ones
    std::int64_t gate_row, gate_col;
    const std::int64_t* idxs;  // [M, top_k] expert indices
    std::int64_t top_k;        // -1: no lists
    const Run* runs;
    std::int64_t num_runs;  // -1: one run over all rows and experts
    double dropout_p;
    std::uint64_t seed;  // of calls without runs
    const void* weight;  // [N, K] of the frozen layer; null: it is not computed here
    const void* bias;    // [N] or null; forward_few only
    const void* x;       // [M, K]; null in a backward without dA
    float* h;  // [M, h_width]: written by the forward (null: not kept), read by the backward
    std::int64_t h_width;     // R, with runs what a row may use, with idxs top_k * largest rank
    void* y;                  // forward: [M, N]
    const void* y_from;       // what y starts from: y itself, other rows [M, N], or in dense calls
    std::int64_t y_from_row;  // a bias [N] (with a row stride of 0), or null for zero
    const void* dy;           // backward: [M, N]
    void* dx;                 // [M, K]; null: not wanted
    bool dx_add;          // dx holds the base's part; else it is written: dense calls only. With
                          // weight the base's part is written first, then added to
    float* dgates;        // [M, E] or [M, top_k], zeroed by the caller; null: not wanted
    const bool* want_da;  // [E]
    const bool* want_db;  // [E]
};

// Memory of one thread, and the packed factors that all share. Sized by the driver.
struct Scratch {
    const float* panels;  // forward: A; backward: Bᵀ; as panels (cpu/pack.h), or where
    bool few;             // R is at most width / 2, as tiles of width / 2 ranks, `width` wide
    const float* tiles;   // forward: Bᵀ; backward: A
    std::int64_t ld;      // of h, u and one: R rounded up to whole panels
    float* h;             // [block, ld]
    float* u;             // [block, ld]
    float* one;           // [block, ld]; one expert's part, dropout only
    float* wide;          // a few rows' strip of x or dy in fp32; bf16 only
    float* copy;          // [block, tile]; backward only
    float* dropped;       // [block, K]; dropout only
    float* da;            // partial gradients as tiles of [R, K] (cpu/pack.h); backward only
    float* db;            // tiles of [R, N]
    bool* da_touched;     // [E] false at the start; a partial is zeroed when first touched
    bool* db_touched;
    const void** rows;           // [4 * block] row pointers
    std::int64_t* pair_row;      // [block * top_k] with idxs
    std::int64_t* pair_slot;     // [block * top_k]
    std::int64_t* expert_begin;  // [E + 1]
    std::int64_t block;          // rows worked on at once
};

struct RowKernels {
    const char* isa;
    std::int64_t width;  // ranks of a panel
    std::int64_t tile;   // columns of a tile
    std::int64_t wide;   // elements of Scratch's `wide`
    // Both walk rows [begin, end) block by block.
    void (*forward)(const Problem&, const Scratch&, std::int64_t begin, std::int64_t end);
    void (*backward)(const Problem&, const Scratch&, std::int64_t begin, std::int64_t end);
    // cpu/few_rows.h: h~ of stacked ranks [begin, end); columns [begin, end) of y and whether the
    // mixture is zero there; columns of the frozen layer's dx.
    void (*few_shrink)(const Problem&, float* h, std::int64_t begin, std::int64_t end);
    bool (*few_expand)(const Problem&, const float* h, float* delta, std::int64_t begin,
                       std::int64_t end);
    void (*base_backward)(const Problem&, std::int64_t begin, std::int64_t end);
};

// y = y_from + the mixture, on all threads. See Problem for what is read and written.
void forward(const Problem& problem, std::int64_t threads);

// y = x Wᵀ + bias + the mixture for few rows, every weight read once; dense calls without dropout.
// True where the mixture is zero in every element: y had then better be the frozen layer's own
// result, to the bit.
bool forward_few(const Problem& problem, std::int64_t threads);

// da_out[e] [r_e, K], db_out[e] [N, r_e] in the adapters' dtype; entries not wanted are ignored.
void backward(const Problem& problem, std::int64_t threads, void* const* da_out,
              void* const* db_out);

}  // namespace fedms
