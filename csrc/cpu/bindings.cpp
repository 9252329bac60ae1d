// Python module fedms.kernels._C: tensors, numbers, flags. Checks, allocation and autograd are
// Python's (fedms/kernels/native.py); the arithmetic is gated_lora*.cpp's.
//
//   set_torch(exchange, parallel_for)   how to read tensors, and torch's threads; once, at import
//   forward(...)                        y = what it starts from + the mixture, optionally keeping h
//   forward_few(...)                    y with the frozen layer, for few rows; whether the mixture
//                                       is zero
//   backward(...)                       dx, dgates, dA, dB
//   isa(), set_isa(name), compiler()
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/gated_lora.h"
#include "cpu/segments.h"
#include "cpu/tensors.h"
#include "isa.h"
#include "parallel.h"

namespace py = pybind11;
using fedms::Reader;
using fedms::View;
using std::int64_t;
using Objects = const std::vector<py::handle>&;

namespace {

// lora_A and lora_B as the caller has them: a part is one expert's matrix or a stack of them.
struct Experts {
    std::vector<int64_t> counts;    // experts of each part
    std::vector<int64_t> ranks{0};  // [E + 1]
    std::vector<const void*> a, b;  // [E]
    bool bf16 = false;

    Experts(Reader& reader, Objects A, Objects B) {
        for (std::size_t i = 0; i < A.size(); ++i) {
            const View part = reader.rows(A[i]);
            counts.push_back(part.ndim == 3 ? part.shape[0] : 1);
            for (int64_t e = 0; e < counts[i]; ++e) ranks.push_back(ranks.back() + part.size(2));
            append(a, part, counts[i]);
            append(b, reader.rows(B[i]), counts[i]);
            bf16 = part.is_bf16();
        }
    }

    // A gradient each, null for a part without.
    std::vector<void*> outputs(const Reader& reader, Objects parts) const {
        std::vector<void*> out;
        for (std::size_t i = 0; i < counts.size(); ++i) {
            append(out, reader.view(parts[i]), counts[i]);
        }
        return out;
    }

  private:
    template <class T>
    static void append(std::vector<T*>& out, const View& part, int64_t count) {
        const int64_t step = part.data == nullptr ? 0 : part.size(1) * part.size(2);
        for (int64_t e = 0; e < count; ++e) out.push_back(part.at<T>(e * step));
    }
};

// What both directions take, and what the Problem points into. gates: fp32 [E], [M, E] or [M, k];
// idxs [M, k], offsets [S + 1], experts [S, W], seed [] or [S]: int64; each a tensor or None.
struct Call {
    Reader reader;
    Experts experts;
    std::vector<float> scale;
    fedms::Problem problem{};
    View offsets, segments, seed;

    Call(Objects A, Objects B, py::handle gates, py::handle idxs, py::handle offsets_,
         py::handle segments_, const std::vector<double>& scale_, double p, py::handle seed_,
         py::handle x, py::handle h)
        : experts(reader, A, B),
          scale(scale_.begin(), scale_.end()),
          offsets(reader.rows(offsets_)),
          segments(reader.rows(segments_)),
          seed(reader.view(seed_)) {
        problem.num_experts = static_cast<int64_t>(scale.size());
        problem.ranks = experts.ranks.data();
        problem.a = experts.a.data();
        problem.b = experts.b.data();
        problem.adapters_bf16 = experts.bf16;
        problem.scale = scale.data();
        const View g = reader.view(gates), pairs = reader.rows(idxs);
        problem.gates = g.at<const float>();
        if (problem.gates != nullptr) {
            problem.gate_row = g.ndim == 2 ? g.strides[0] : 0;
            problem.gate_col = g.strides[g.ndim - 1];
        }
        problem.idxs = pairs.at<const int64_t>();
        problem.top_k = pairs.shape == nullptr ? -1 : pairs.shape[1];
        problem.num_runs = -1;
        problem.dropout_p = p;
        problem.seed = seed.data == nullptr ? 0 : *seed.at<const std::uint64_t>();
        const View rows = reader.rows(x), kept = reader.view(h);
        problem.x = rows.at<const void>();
        problem.h = kept.at<float>();
        problem.h_width = kept.ndim == 2 ? kept.shape[1] : 0;
    }

    // rows: x or dy, [..., K] or [..., N].
    void set_sizes(const View& rows, int64_t k, int64_t n) {
        problem.m = rows.rows(), problem.k = k, problem.n = n;
        problem.bf16 = rows.is_bf16();
    }

    // The segments as runs; without the interpreter's lock.
    void read_segments() {
        if (offsets.shape == nullptr) return;
        runs_ = fedms::runs_of(offsets.at<const int64_t>(), segments.at<const int64_t>(),
                               segments.shape[0], segments.shape[1], seed.at<const int64_t>(),
                               seed.ndim == 1, problem.m, experts.ranks);
        problem.runs = runs_.data();
        problem.num_runs = static_cast<int64_t>(runs_.size());
    }

  private:
    std::vector<fedms::Run> runs_;
};

// y_from: [..., N] (y itself, or only read), bias [N], or None: zero.
void forward(int64_t threads, py::handle y, py::handle y_from, py::handle x, Objects A, Objects B,
             py::handle gates, py::handle idxs, py::handle offsets, py::handle segments,
             const std::vector<double>& scale, double p, py::handle seed, py::handle h) {
    Call call(A, B, gates, idxs, offsets, segments, scale, p, seed, x, h);
    const View out = call.reader.view(y), from = call.reader.rows(y_from);
    call.set_sizes(out, call.reader.view(x).size(1), out.size(1));
    call.problem.y = out.at<void>();
    call.problem.y_from = from.at<const void>();
    call.problem.y_from_row = from.ndim > 1 ? from.size(1) : 0;
    py::gil_scoped_release release;
    call.read_segments();
    fedms::forward(call.problem, threads);
}

bool forward_few(int64_t threads, py::handle y, py::handle weight, py::handle bias, py::handle x,
                 Objects A, Objects B, py::handle gates, const std::vector<double>& scale) {
    const py::none none;
    Call call(A, B, gates, none, none, none, scale, 0.0, none, x, none);
    const View w = call.reader.view(weight), out = call.reader.view(y);
    call.set_sizes(out, w.shape[1], w.shape[0]);
    call.problem.y = out.at<void>();
    call.problem.weight = w.at<const void>();
    call.problem.bias = call.reader.rows(bias).at<const void>();
    py::gil_scoped_release release;
    return fedms::forward_few(call.problem, threads);
}

// dx: None where it is not wanted. weight: None where the base's part of dx is not computed here.
// da, db: a gradient a part, None where it is not wanted.
void backward(int64_t threads, py::handle dy, py::handle dx, bool dx_add, py::handle weight,
              py::handle dgates, Objects da, Objects db, py::handle x, Objects A, Objects B,
              py::handle gates, py::handle idxs, py::handle offsets, py::handle segments,
              const std::vector<double>& scale, double p, py::handle seed, py::handle h) {
    Call call(A, B, gates, idxs, offsets, segments, scale, p, seed, x, h);
    const View rows = call.reader.rows(dy), first = call.reader.view(A[0]);
    call.set_sizes(rows, first.size(1), rows.size(1));
    const std::vector<void*> da_out = call.experts.outputs(call.reader, da);
    const std::vector<void*> db_out = call.experts.outputs(call.reader, db);
    const std::size_t count = da_out.size();
    std::unique_ptr<bool[]> want(new bool[2 * count + 1]);
    for (std::size_t e = 0; e < count; ++e) {
        want[e] = da_out[e] != nullptr;
        want[count + e] = db_out[e] != nullptr;
    }
    call.problem.dy = rows.at<const void>();
    call.problem.dx = call.reader.view(dx).at<void>();
    call.problem.dx_add = dx_add;
    call.problem.weight = call.reader.view(weight).at<const void>();
    call.problem.dgates = call.reader.view(dgates).at<float>();
    call.problem.want_da = want.get();
    call.problem.want_db = want.get() + count;
    py::gil_scoped_release release;
    call.read_segments();
    fedms::backward(call.problem, threads, da_out.data(), db_out.data());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of fedms; use fedms.kernels instead.";
    m.def("set_torch", [](const py::capsule& exchange, int64_t parallel_for) {
        fedms::set_exchange(exchange);
        fedms::parallel_for_slot() = reinterpret_cast<fedms::ParallelFor>(parallel_for);
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
    m.def("forward", &forward);
    m.def("forward_few", &forward_few);
    m.def("backward", &backward);
}
