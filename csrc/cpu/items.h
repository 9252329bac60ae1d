// A chunk's rows as blocks, and a block as items: rows that all use the same consecutive experts.
#pragma once

#include <cstring>

#include "cpu/gated_lora.h"

namespace {

using std::int64_t;

// Rows `row(0) .. row(n - 1)` that use experts [first, last).
struct Item {
    int64_t n, first, last;
    int64_t begin;         // dense: rows begin, begin + 1, ...
    int64_t column;        // dense: of the first expert's ranks in a row of h
    std::uint64_t seed;    // of the dropout mask, whose rows and experts count from mask_row and,
    int64_t mask_row;      // at `first`, mask_expert
    int64_t mask_expert;   //
    const int64_t* pairs;  // top-k: the rows
    const int64_t* slots;  // top-k: which of the row's k entries
    int64_t row(int64_t i) const { return pairs ? pairs[i] : begin + i; }
};

// The (row, slot) pairs of rows [begin, end), by expert and then by row.
void sort_pairs(const fedms::Problem& p, const fedms::Scratch& s, int64_t begin, int64_t end) {
    int64_t* at = s.expert_begin;
    std::memset(at, 0, (p.num_experts + 1) * sizeof(int64_t));
    for (int64_t i = begin * p.top_k; i < end * p.top_k; ++i) ++at[p.idxs[i] + 1];
    for (int64_t e = 0; e < p.num_experts; ++e) at[e + 1] += at[e];
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t slot = 0; slot < p.top_k; ++slot) {
            const int64_t to = at[p.idxs[row * p.top_k + slot]]++;
            s.pair_row[to] = row;
            s.pair_slot[to] = slot;
        }
    }
    for (int64_t e = p.num_experts; e > 0; --e) at[e] = at[e - 1];
    at[0] = 0;
}

// Calls block(row, stop) for every block of the rows, and then f(item) for each item in it.
template <class B, class F>
void for_each_item(const fedms::Problem& p, const fedms::Scratch& s, int64_t begin, int64_t end, const B& block,
                   const F& f) {
    for (int64_t row = begin; row < end; row += s.block) {
        const int64_t stop = row + s.block < end ? row + s.block : end;
        block(row, stop);
        if (p.top_k >= 0) {
            sort_pairs(p, s, row, stop);
            for (int64_t e = 0; e < p.num_experts; ++e) {
                int64_t i = s.expert_begin[e];
                while (i < s.expert_begin[e + 1]) {
                    // A row listed twice for one expert starts a new item: a tile must not hold a
                    // row twice.
                    int64_t j = i + 1;
                    while (j < s.expert_begin[e + 1] && j - i < s.block &&
                           s.pair_row[j] != s.pair_row[j - 1]) {
                        ++j;
                    }
                    f(Item{j - i, e, e + 1, 0, 0, p.seed, 0, e, s.pair_row + i, s.pair_slot + i});
                    i = j;
                }
            }
        } else if (p.num_runs < 0) {
            f(Item{stop - row, 0, p.num_experts, row, 0, p.seed, 0, 0, nullptr, nullptr});
        } else {
            for (int64_t i = 0; i < p.num_runs; ++i) {
                const fedms::Run& run = p.runs[i];
                const int64_t from = run.row_begin > row ? run.row_begin : row,
                              to = run.row_end < stop ? run.row_end : stop;
                if (from < to) {
                    f(Item{to - from, run.first, run.last, from, run.column, run.seed,
                           run.mask_row, run.mask_expert, nullptr, nullptr});
                }
            }
        }
    }
}

}  // namespace
