// One way to launch a kernel, on a stream, with the grid checked and the error named.
#pragma once

#include "cuda/element.cuh"
#include "cuda/problem.cuh"

#ifdef __CUDACC__
// A block's shared memory: one struct a kernel.
#define FEDMS_SHARED(Type, name) __shared__ Type name
#endif

namespace fedms {

struct Grid {
    std::int64_t x, y;
};

// f(Type<T>{}) for the T that the dtype names.
template <class T>
struct Type {
    using type = T;
};

template <class F>
Status by_dtype(DType dtype, const F& f) {
    switch (dtype) {
        case DType::bf16:
            return f(Type<bf16>{});
        case DType::f16:
            return f(Type<f16>{});
        default:
            return f(Type<float>{});
    }
}

// An empty grid is no launch and no error.
template <class Call>
Status launch(const char* name, void (*kernel)(Call), Grid grid, int threads, cudaStream_t stream,
              const Call& call) {
    static_assert(sizeof(Call) <= 4096, "a launch's parameters hold 4 KB");
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
    if (grid.x > INT32_MAX || grid.y > 65535) return {name, cudaErrorInvalidConfiguration, blocks};
    if (grid.x == 0 || grid.y == 0) return {nullptr, cudaSuccess, blocks};
#ifdef __CUDACC__
    kernel<<<blocks, threads, 0, stream>>>(call);
#else
    host::run(kernel, blocks, threads, stream, call);
#endif
    return {name, cudaGetLastError(), blocks};
}

}  // namespace fedms
