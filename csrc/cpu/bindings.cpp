// Python module fedms.kernels._C: pointers as integers, sizes, flags. Checks, allocation and
// autograd are Python's (fedms/kernels/native.py); the arithmetic is gated_lora*.cpp's.
//
//   set_parallel_for(address)   torch's thread pool, once at import
//   forward(call)               y = what it starts from + the mixture, optionally keeping h
//   forward_few(call)           y with the frozen layer, for few rows; whether the mixture is zero
//   backward(call)              dx, dgates, dA, dB
//   isa(), set_isa(name), compiler()
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/gated_lora.h"
#include "cpu/segments.h"
#include "isa.h"
#include "parallel.h"

namespace py = pybind11;
using std::int64_t;
using Ints = std::vector<int64_t>;

namespace {

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(address);
}

std::vector<const void*> pointers(const Ints& addresses) {
    std::vector<const void*> out;
    for (int64_t address : addresses) out.push_back(pointer<const void>(address));
    return out;
}

// What both directions share. Owns the arrays that the Problem points into.
//
// offsets, experts: addresses of the segments' int64 tensors, segments -1 without. seed: of int64,
// one, or with own_seeds one a segment; 0 without dropout.
struct Call {
    std::vector<const void*> a, b;
    Ints ranks;
    std::vector<fedms::Run> runs;
    std::vector<float> scale;
    fedms::Problem problem{};

    Call(int64_t m, int64_t k, int64_t n, bool bf16, bool adapters_bf16, const Ints& a_,
         const Ints& b_, Ints ranks_, const std::vector<double>& scale_, int64_t gates,
         int64_t gate_row, int64_t gate_col, int64_t idxs, int64_t top_k, int64_t offsets,
         int64_t experts, int64_t segments, int64_t segment_width, double p, int64_t seed,
         bool own_seeds, int64_t x, int64_t h, int64_t h_width)
        : a(pointers(a_)),
          b(pointers(b_)),
          ranks(std::move(ranks_)),
          scale(scale_.begin(), scale_.end()) {
        problem.m = m, problem.k = k, problem.n = n;
        problem.num_experts = static_cast<int64_t>(scale.size());
        problem.bf16 = bf16;
        problem.ranks = ranks.data();
        problem.a = a.data();
        problem.b = b.data();
        problem.adapters_bf16 = adapters_bf16;
        problem.scale = scale.data();
        problem.gates = pointer<const float>(gates);
        problem.gate_row = gate_row, problem.gate_col = gate_col;
        problem.idxs = pointer<const int64_t>(idxs);
        problem.top_k = top_k;
        const auto* seeds = pointer<const int64_t>(seed);
        problem.num_runs = -1;
        if (segments >= 0) {
            runs = fedms::runs_of(pointer<const int64_t>(offsets), pointer<const int64_t>(experts),
                                  segments, segment_width, seeds, own_seeds, m, ranks);
            problem.runs = runs.data();
            problem.num_runs = static_cast<int64_t>(runs.size());
        }
        problem.dropout_p = p;
        problem.seed = seeds == nullptr ? 0 : static_cast<std::uint64_t>(*seeds);
        problem.x = pointer<const void>(x);
        problem.h = pointer<float>(h);
        problem.h_width = h_width;
    }
};

template <class... Args>
void forward(int64_t threads, int64_t y, int64_t y_from, int64_t y_from_row, Args... args) {
    py::gil_scoped_release release;
    Call call(std::move(args)...);
    call.problem.y = pointer<void>(y);
    call.problem.y_from = pointer<const void>(y_from);
    call.problem.y_from_row = y_from_row;
    fedms::forward(call.problem, threads);
}

template <class... Args>
bool forward_few(int64_t threads, int64_t y, int64_t weight, int64_t bias, Args... args) {
    py::gil_scoped_release release;
    Call call(std::move(args)...);
    call.problem.y = pointer<void>(y);
    call.problem.weight = pointer<const void>(weight);
    call.problem.bias = pointer<const void>(bias);
    return fedms::forward_few(call.problem, threads);
}

// da, db: addresses, 0 where no gradient is wanted.
template <class... Args>
void backward(int64_t threads, int64_t dy, int64_t dx, bool dx_add, int64_t weight, int64_t dgates,
              const Ints& da, const Ints& db, Args... args) {
    py::gil_scoped_release release;
    Call call(std::move(args)...);
    const std::size_t count = da.size();
    std::unique_ptr<bool[]> want(new bool[2 * count + 1]);
    std::vector<void*> da_out, db_out;
    for (std::size_t e = 0; e < count; ++e) {
        want[e] = da[e] != 0;
        want[count + e] = db[e] != 0;
        da_out.push_back(pointer<void>(da[e]));
        db_out.push_back(pointer<void>(db[e]));
    }
    call.problem.dy = pointer<const void>(dy);
    call.problem.dx = pointer<void>(dx);
    call.problem.dx_add = dx_add;
    call.problem.weight = pointer<const void>(weight);
    call.problem.dgates = pointer<float>(dgates);
    call.problem.want_da = want.get();
    call.problem.want_db = want.get() + count;
    fedms::backward(call.problem, threads, da_out.data(), db_out.data());
}

// The shared arguments' types, in Call's order.
template <template <class...> class Holder>
using Shared = Holder<int64_t, int64_t, int64_t, bool, bool, Ints, Ints, Ints, std::vector<double>,
                      int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                      int64_t, double, int64_t, bool, int64_t, int64_t, int64_t>;

template <class... Args>
struct Bind {
    static void into(py::module_& m) {
        m.def("forward", &forward<Args...>);
        m.def("forward_few", &forward_few<Args...>);
        m.def("backward", &backward<Args...>);
    }
};

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of fedms on raw pointers; use fedms.kernels instead.";
    m.def("set_parallel_for", [](int64_t address) {
        fedms::parallel_for_slot() = reinterpret_cast<fedms::ParallelFor>(address);
    });
    m.def("isa", [] { return std::string(fedms::rows_slot()->isa); });
    m.def("set_isa", [](const std::string& name) { return fedms::set_isa(name.c_str()); });
    m.def("compiler", [] { return std::string(__VERSION__); });
    // Throws inside a parallel body, for the test that an error on a worker thread arrives.
    m.def("parallel_for_throws", [](int64_t n) {
        py::gil_scoped_release release;
        fedms::parallel_for(n, [n](int64_t i) {
            if (i == n - 1) throw std::runtime_error("thrown in a parallel body");
        });
    });
    Shared<Bind>::into(m);
}
