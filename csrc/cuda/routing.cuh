// Which rows and experts a block works on, and the coefficient of a (row, expert) pair.
#pragma once

#include "cuda/element.cuh"

namespace fedms {

__device__ inline const Expert& expert_at(const Problem& p, std::int32_t e) {
    return p.table != nullptr ? p.table[e] : p.inlined[e];
}

// Last entry in [first, last) whose `key` is at most `value`; the first one's always is.
template <class Entry>
__device__ inline std::int32_t find(const Entry* entries, std::int32_t first, std::int32_t last,
                                    std::int32_t Entry::* key, std::int64_t value) {
    while (last - first > 1) {
        const std::int32_t middle = first + (last - first) / 2;
        if (entries[middle].*key <= value) {
            first = middle;
        } else {
            last = middle;
        }
    }
    return first;
}

struct Place {
    std::int32_t row, column;  // row -1: behind the end
    std::int32_t seed, mask_row, mask_expert;
};

__device__ inline Place place_in(const Problem& p, std::int32_t rows, std::int32_t first,
                                 std::int32_t last, std::int64_t position) {
    if (position >= rows) return {-1, -1, 0, 0, 0};
    const Range& range =
        p.routes.ranges[find(p.routes.ranges, first, last, &Range::position, position)];
    return {std::int32_t(range.row + (position - range.position)), range.column, range.seed,
            range.mask_row, range.mask_expert};
}

// The row at a position of a group (any number without segments), and whose masks it has.
__device__ inline Place place_in_group(const Problem& p, std::int32_t group,
                                       std::int64_t position) {
    if (p.routes.num_groups < 0) {
        return {position < p.m ? std::int32_t(position) : -1, -1, 0, 0, 0};
    }
    const Group& g = p.routes.groups[group];
    return place_in(p, g.rows, g.first_range, g.last_range, position);
}

// A tile of rows and one expert of them.
struct Item {
    std::int32_t expert, column, group, mask_expert;
    std::int64_t tile;
};

// The unit-th of all (expert, tile) pairs. Without segments neighbours share the tile.
__device__ inline Item item_at(const Problem& p, std::int64_t unit) {
    if (p.routes.num_groups < 0) {
        const std::int32_t expert = std::int32_t(unit % p.num_experts);
        return {expert, expert_at(p, expert).offset, 0, expert, unit / p.num_experts};
    }
    const Member& member =
        p.routes
            .members[find(p.routes.members, 0, p.routes.num_members, &Member::tiles_before, unit)];
    return {member.expert, member.column, member.group, member.mask_expert,
            unit - member.tiles_before};
}

// gate * scale of a pair, and where its h is in the row. column -1: the pair does not exist.
struct Pair {
    float coefficient;
    std::int32_t column;
};

__device__ inline Pair pair_at(const Problem& p, std::int32_t expert, std::int32_t row,
                               std::int32_t column) {
    if (row < 0) return {0.0f, -1};
    const float scale = expert_at(p, expert).scale;
    if (p.top_k < 0) {
        if (p.gates == nullptr) return {scale, column};
        return {scale * read(p.gates, p.gate, row * p.gate_row + expert * p.gate_col), column};
    }
    // An expert listed twice has one h, at its first slot, and the sum of its gates.
    Pair pair{0.0f, -1};
    for (std::int32_t slot = 0; slot < p.top_k; ++slot) {
        if (p.idxs[std::int64_t(row) * p.top_k + slot] != expert) continue;
        if (pair.column < 0) pair.column = slot * p.slot_width;
        pair.coefficient +=
            p.gates == nullptr ? 1.0f : read(p.gates, p.gate, row * p.gate_row + slot * p.gate_col);
    }
    pair.coefficient *= scale;
    return pair;
}

}  // namespace fedms
