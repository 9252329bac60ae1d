// The experts' parameters as the row kernels read them: rows of fp32 A, rows of fp32 Bᵀ.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace fedms {

// A [r_e, K] is used where it lies when it is fp32; B [N, r_e] is always transposed (R N elements,
// small against the M N of y). Read again on every call: nothing is cached across calls.
class PackedExperts {
  public:
    PackedExperts(const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b,
                  const std::vector<std::int64_t>& ranks, std::int64_t k, std::int64_t n,
                  bool bf16) {
        const std::int64_t total = ranks.back();
        bt_.reset(new float[static_cast<std::size_t>(total * n)]);
        if (bf16) a_.reset(new float[static_cast<std::size_t>(total * k)]);
        for (std::size_t e = 0; e + 1 < ranks.size(); ++e) {
            const std::int64_t r0 = ranks[e], r = ranks[e + 1] - r0;
            const void* from_a = reinterpret_cast<const void*>(a[e]);
            const void* from_b = reinterpret_cast<const void*>(b[e]);
            float* to = bt_.get() + r0 * n;
            if (bf16) {
                const auto* source = static_cast<const std::uint16_t*>(from_a);
                for (std::int64_t i = 0; i < r * k; ++i) a_[r0 * k + i] = widen(source[i]);
                transpose(static_cast<const std::uint16_t*>(from_b), n, r, to);
            } else {
                transpose(static_cast<const float*>(from_b), n, r, to);
            }
            const float* rows = bf16 ? a_.get() + r0 * k : static_cast<const float*>(from_a);
            for (std::int64_t j = 0; j < r; ++j) {
                a_rows.push_back(rows + j * k);
                bt_rows.push_back(to + j * n);
            }
        }
    }

    std::vector<const float*> a_rows, bt_rows;

  private:
    static float widen(float x) { return x; }
    static float widen(std::uint16_t bits) {
        const std::uint32_t u = static_cast<std::uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &u, sizeof x);
        return x;
    }
    template <class T>
    static void transpose(const T* b, std::int64_t n, std::int64_t r, float* out) {
        constexpr std::int64_t kTile = 64;
        for (std::int64_t c0 = 0; c0 < n; c0 += kTile) {
            const std::int64_t end = c0 + kTile < n ? c0 + kTile : n;
            for (std::int64_t j = 0; j < r; ++j) {
                for (std::int64_t c = c0; c < end; ++c) out[j * n + c] = widen(b[c * r + j]);
            }
        }
    }

    std::unique_ptr<float[]> a_, bt_;
};

}  // namespace fedms
