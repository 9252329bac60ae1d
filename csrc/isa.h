// Which instruction set the row kernels use: the best this CPU has, picked once.
//
// gated_lora_rows.cpp is compiled once per entry with its own -march, because its register tiles
// depend on the width (target_clones would share one tile size).
#pragma once

#include <cstring>

#include "cpu/gated_lora.h"

namespace fedms {

extern const RowKernels kRowsGeneric;
#if defined(FEDMS_X86)
extern const RowKernels kRowsV3;  // AVX2 and FMA
extern const RowKernels kRowsV4;  // AVX-512
#endif

inline const RowKernels* best_rows() {
#if defined(FEDMS_X86)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512cd");
    if (v4) return &kRowsV4;
    if (v3) return &kRowsV3;
#endif
    return &kRowsGeneric;
}

inline const RowKernels*& rows_slot() {
    static const RowKernels* slot = best_rows();
    return slot;
}

// For tests: use a lesser instruction set. False when this CPU or build does not have it.
inline bool set_isa(const char* name) {
    const RowKernels* best = best_rows();
    const RowKernels* all[] = {
        &kRowsGeneric,
#if defined(FEDMS_X86)
        &kRowsV3,
        &kRowsV4,
#endif
    };
    for (const RowKernels* rows : all) {  // in rising order: none after the best one can run
        if (std::strcmp(rows->isa, name) == 0) {
            rows_slot() = rows;
            return true;
        }
        if (rows == best) return false;
    }
    return false;
}

}  // namespace fedms
