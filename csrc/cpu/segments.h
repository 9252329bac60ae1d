// Segments as runs: fedms/kernels/segments.py's `read_runs`, without a Python loop.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gated_lora.h"

namespace fedms {

// offsets [segments + 1]; experts [segments, width], -1 where there is none. seeds: one for all, or
// with `own_seeds` one a segment; null without dropout. ranks [E + 1]: as in Problem.
inline std::vector<Run> runs_of(const std::int64_t* offsets, const std::int64_t* experts,
                                std::int64_t segments, std::int64_t width,
                                const std::int64_t* seeds, bool own_seeds, std::int64_t m,
                                const std::vector<std::int64_t>& ranks) {
    using std::to_string;
    std::vector<Run> runs;
    std::vector<std::int64_t> order;
    const auto num_experts = static_cast<std::int64_t>(ranks.size()) - 1;
    for (std::int64_t i = 0; i < segments; ++i) {
        const std::int64_t begin = offsets[i], end = offsets[i + 1];
        if (begin > end || (i == 0 && begin != 0)) {
            throw std::invalid_argument(
                "segments.offsets must start at 0 and never decrease, got " + to_string(begin) +
                " and " + to_string(end) + " at " + to_string(i));
        }
        order.clear();
        for (std::int64_t j = 0; j < width; ++j) {
            const std::int64_t e = experts[i * width + j];
            if (e == -1) continue;
            if (e < 0 || e >= num_experts) {
                throw std::invalid_argument("segments.experts[" + to_string(i) +
                                            "] must be in [0, " + to_string(num_experts) +
                                            "), got " + to_string(e));
            }
            order.push_back(e);
        }
        std::sort(order.begin(), order.end());
        if (std::adjacent_find(order.begin(), order.end()) != order.end()) {
            throw std::invalid_argument("segments.experts[" + to_string(i) +
                                        "] must hold distinct indices, got one twice");
        }
        if (begin == end) continue;
        const auto count = static_cast<std::int64_t>(order.size());
        std::int64_t column = 0;
        for (std::int64_t first = 0, j = 1; j <= count; ++j) {
            if (j < count && order[j] == order[j - 1] + 1) continue;
            Run run{begin, end, order[first], order[j - 1] + 1, column, 0, order[first], 0};
            column += ranks[run.last] - ranks[run.first];
            if (own_seeds) {
                run.mask_row = begin;
                run.mask_expert = first;
            }
            if (seeds != nullptr) run.seed = static_cast<std::uint64_t>(seeds[own_seeds ? i : 0]);
            runs.push_back(run);
            first = j;
        }
    }
    if (offsets[segments] != m) {
        throw std::invalid_argument("segments.offsets must cover the " + to_string(m) +
                                    " rows of x, the last one is " + to_string(offsets[segments]));
    }
    return runs;
}

}  // namespace fedms
