// parallel_for over torch's own thread pool, without a torch header or an OpenMP runtime.
//
// torch exports the C symbol torch_parallel_for (its stable shim); Python hands its address in once
// with set_parallel_for. Without it everything runs on the calling thread.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>

namespace fedms {

using ParallelBody = void (*)(std::int64_t begin, std::int64_t end, void* ctx);
using ParallelFor = std::int32_t (*)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                                     ParallelBody body, void* ctx);

inline ParallelFor& parallel_for_slot() {
    static ParallelFor slot = nullptr;
    return slot;
}

// Calls f(i) for every i in [0, n), on as many threads as torch uses. An exception thrown by f is
// rethrown here (one of them, when several are).
template <class F>
void parallel_for(std::int64_t n, const F& f) {
    ParallelFor run = parallel_for_slot();
    if (run == nullptr || n <= 1) {
        for (std::int64_t i = 0; i < n; ++i) f(i);
        return;
    }
    struct Context {
        const F* f;
        std::exception_ptr* errors;  // one each, so that no two threads write the same
    };
    auto* errors = new std::exception_ptr[static_cast<std::size_t>(n)];
    Context context{&f, errors};
    std::int32_t status = run(
        0, n, 1,
        [](std::int64_t begin, std::int64_t end, void* ctx) {
            auto* c = static_cast<Context*>(ctx);
            for (std::int64_t i = begin; i < end; ++i) {
                try {
                    (*c->f)(i);
                } catch (...) {
                    c->errors[i] = std::current_exception();
                }
            }
        },
        &context);
    std::exception_ptr first;
    for (std::int64_t i = n - 1; i >= 0; --i) {
        if (errors[i]) first = errors[i];
    }
    delete[] errors;
    if (first) std::rethrow_exception(first);
    if (status != 0) throw std::runtime_error("fedms: torch_parallel_for failed");
}

}  // namespace fedms
