// Dropout of one row in registers; the mask's definition is in cpu/dropout.h.
#pragma once

#include "cpu/dropout.h"
#include "cpu/vec.h"

namespace {

// out = x * mask * inverse, fp32, for the row whose key is (lo, hi). out may be x.
template <class T>
void drop_row(const T* x, float* out, std::int64_t k, std::uint32_t lo, std::uint32_t hi,
              std::uint32_t threshold, float inverse) {
    std::int64_t c = 0;
    VecU column;
    for (int lane = 0; lane < kWidth; ++lane) column[lane] = static_cast<std::uint32_t>(lane);
    for (; c + kWidth <= k; c += kWidth, column += kWidth) {
        VecU v = column * 0x9E3779B1u + lo;
        v = (v ^ (v >> 16)) * 0x7FEB352Du;
        v = ((v ^ (v >> 15)) ^ hi) * 0x846CA68Bu;
        v ^= v >> 16;
        const VecU keep = (VecU)(v >= threshold);
        store(out + c, (Vec)((VecU)(load(x + c) * inverse) & keep));
    }
    if (c < k) {
        float part[kWidth];
        store(part, load_part(x + c, k - c));
        for (std::int64_t j = 0; c < k; ++c, ++j) {
            const bool keep =
                fedms::keep_element(lo, hi, static_cast<std::uint32_t>(c), threshold);
            out[c] = keep ? part[j] * inverse : 0.0f;
        }
    }
}

}  // namespace
