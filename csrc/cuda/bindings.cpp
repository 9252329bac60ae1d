// Python module fedms.kernels._C_cuda: addresses as integers, sizes, a stream handle. Checks,
// allocation, the order of the launches and autograd are Python's (fedms/kernels/cuda.py).
//
//   Call(...)                            what a call is: experts, routing, dropout, device, stream
//   shrink, expand, combine, outer       one launch each (outer: two with splits)
//   expert_words(...), upload(...)       tables that do not fit a launch's parameters
//   state()                              whether it can run, in words
//
// cudart is linked statically, so the module imports on a machine without a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/combine.cuh"
#include "cuda/expand.cuh"
#include "cuda/outer.cuh"
#include "cuda/shrink.cuh"
#include "cuda/upload.cuh"
#ifdef FEDMS_CUDA_HOST
#include "fibres.h"
#endif

namespace py = pybind11;
using std::int64_t;
using Ints = std::vector<int64_t>;

namespace {

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(address);
}

void check(const fedms::Status& status, const std::string& shape) {
    if (status.error == cudaSuccess) return;
    throw std::runtime_error("CUDA kernel " + std::string(status.kernel) + " could not run on " +
                             shape + " (grid " + std::to_string(status.grid.x) + " x " +
                             std::to_string(status.grid.y) +
                             "): " + cudaGetErrorString(status.error));
}

// The launch's device is current while this lives.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check("cudaGetDevice", cudaGetDevice(&before_));
        if (before_ != device) check("cudaSetDevice", cudaSetDevice(device));
        changed_ = before_ != device;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    static void check(const char* what, cudaError_t error) {
        if (error == cudaSuccess) return;
        throw std::runtime_error("fedms.kernels._C_cuda cannot run: " + std::string(what) + ": " +
                                 cudaGetErrorString(error));
    }
    int before_ = 0;
    bool changed_ = false;
};

std::vector<fedms::Expert> experts_of(const Ints& a, const Ints& b, const Ints& da, const Ints& db,
                                      const Ints& ranks, const std::vector<double>& scale) {
    std::vector<fedms::Expert> experts(a.size());
    int64_t offset = 0;
    for (std::size_t e = 0; e < a.size(); ++e) {
        experts[e] = {pointer<const void>(a[e]),
                      pointer<const void>(b[e]),
                      da.empty() ? nullptr : pointer<void>(da[e]),
                      db.empty() ? nullptr : pointer<void>(db[e]),
                      static_cast<float>(scale[e]),
                      static_cast<std::int32_t>(ranks[e]),
                      static_cast<std::int32_t>(offset),
                      0};
        offset += ranks[e];
    }
    return experts;
}

py::bytes expert_words(const Ints& a, const Ints& b, const Ints& da, const Ints& db,
                       const Ints& ranks, const std::vector<double>& scale) {
    const auto experts = experts_of(a, b, da, db, ranks, scale);
    return {reinterpret_cast<const char*>(experts.data()), experts.size() * sizeof(experts[0])};
}

struct Call {
    fedms::Problem problem{};
    fedms::DType dtype;
    int64_t k, n, total_ranks = 0;
    int device;
    cudaStream_t stream;

    // table: address of uploaded expert_words, 0 when they are few. top_k: -1 without idxs, whose
    // address may be 0 where they are empty. routes: address and the counts of groups, members,
    // group tiles, member tiles, or address 0. seed: the seeds' address, 0 without dropout.
    Call(int device_, int64_t stream_, int64_t m, int64_t k_, int64_t n_, int dtype_, int adapter,
         const Ints& a, const Ints& b, const Ints& da, const Ints& db, const Ints& ranks,
         const std::vector<double>& scale, int64_t table, int64_t gates, int gate_dtype,
         int64_t gate_row, int64_t gate_col, int64_t idxs, int top_k, int width,
         const std::array<int64_t, 5>& routes, double p, int64_t seed)
        : dtype(static_cast<fedms::DType>(dtype_)),
          k(k_),
          n(n_),
          device(device_),
          stream(pointer<CUstream_st>(stream_)) {
        const auto experts = experts_of(a, b, da, db, ranks, scale);
        int64_t largest = 0;
        for (const int64_t rank : ranks) {
            largest = std::max(largest, rank);
            total_ranks += rank;
        }
        if (table == 0) {
            if (experts.size() > fedms::kInline) {
                throw std::invalid_argument("table must be given for more than " +
                                            std::to_string(fedms::kInline) + " experts, got " +
                                            std::to_string(experts.size()));
            }
            std::copy(experts.begin(), experts.end(), problem.inlined);
        }
        problem.table = pointer<const fedms::Expert>(table);
        problem.gates = pointer<const void>(gates);
        problem.gate = static_cast<fedms::DType>(gate_dtype);
        problem.gate_row = gate_row, problem.gate_col = gate_col;
        problem.idxs = pointer<const int64_t>(idxs);
        problem.top_k = top_k;
        problem.slot_width = static_cast<std::int32_t>(largest);
        problem.width = width;
        problem.m = m;
        problem.num_experts = static_cast<std::int32_t>(experts.size());
        problem.chunks = static_cast<std::int32_t>(fedms::ceil_div(largest, fedms::kRanks));
        problem.adapter = static_cast<fedms::DType>(adapter);
        problem.dropout = p > 0.0;
        problem.threshold = static_cast<std::uint32_t>(p * 4294967296.0);
        problem.keep_scale = static_cast<float>(1.0 / (1.0 - p));
        problem.seeds = pointer<const std::uint64_t>(seed);
        set_routes(routes);
    }

    void set_routes(const std::array<int64_t, 5>& routes) {
        fedms::Routes& r = problem.routes;
        r.num_groups = -1;
        if (routes[0] == 0) return;
        r.num_groups = static_cast<std::int32_t>(routes[1]);
        r.num_members = static_cast<std::int32_t>(routes[2]);
        r.group_tiles = static_cast<std::int32_t>(routes[3]);
        r.member_tiles = static_cast<std::int32_t>(routes[4]);
        r.groups = pointer<const fedms::Group>(routes[0]);
        r.members = reinterpret_cast<const fedms::Member*>(r.groups + r.num_groups);
        r.row_sets = reinterpret_cast<const fedms::RowSet*>(r.members + r.num_members);
        r.ranges = reinterpret_cast<const fedms::Range*>(r.row_sets + problem.num_experts);
    }

    template <class Launch, class Kernel>
    void run(Launch launch, const Kernel& kernel) const {
        const DeviceGuard guard(device);
        const fedms::Status status = launch(kernel, stream);
        check(status, "M=" + std::to_string(problem.m) + " K=" + std::to_string(k) +
                          " N=" + std::to_string(n) + " E=" + std::to_string(problem.num_experts) +
                          " R=" + std::to_string(total_ranks));
    }
};

void shrink(const Call& call, int64_t in, int64_t out, int splits, int64_t per_split,
             bool from_b) {
    call.run(fedms::launch_shrink,
             fedms::Shrink{call.problem, pointer<const void>(in), pointer<float>(out),
                            from_b ? call.n : call.k, per_split, splits, from_b, call.dtype});
}

void expand(const Call& call, int64_t h, int splits, int64_t sum, int64_t from, bool from_rows,
            int64_t out, bool from_b, bool narrow) {
    call.run(fedms::launch_expand,
             fedms::Expand{call.problem, pointer<const float>(h), pointer<float>(sum),
                           pointer<const void>(from), pointer<void>(out),
                           from_b ? call.n : call.k, splits, from_rows, from_b, narrow,
                           call.dtype});
}

void combine(const Call& call, int64_t partial, int splits, int64_t u, int64_t h, int64_t dg) {
    call.run(fedms::launch_combine,
             fedms::Combine{call.problem, pointer<const float>(partial), pointer<float>(u),
                            pointer<const float>(h), pointer<float>(dg), splits});
}

void outer(const Call& call, int64_t in, int64_t ranks, int64_t partial, int splits, bool to_b) {
    call.run(fedms::launch_outer,
             fedms::Outer{call.problem, pointer<const void>(in), pointer<const float>(ranks),
                           pointer<float>(partial), to_b ? call.n : call.k, call.total_ranks,
                           splits, to_b, call.dtype});
}

void upload(int device, int64_t stream, int64_t to, const std::string& bytes) {
    std::vector<std::uint64_t> words((bytes.size() + 7) / 8);
    std::memcpy(words.data(), bytes.data(), bytes.size());
    const DeviceGuard guard(device);
    check(fedms::launch_upload(words.data(), static_cast<int64_t>(words.size()),
                               pointer<std::uint64_t>(to), pointer<CUstream_st>(stream)),
          std::to_string(bytes.size()) + " bytes");
}

std::string state() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) return std::string("built, cannot run: ") + cudaGetErrorString(error);
    return "built, " + std::to_string(devices) + " device(s); not chosen by the plan";
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.doc() = "CUDA kernels of fedms on raw pointers; use fedms.kernels instead.";
    m.attr("MAX_INLINE_EXPERTS") = fedms::kInline;
    m.attr("TILE_ROWS") = fedms::kRows;
    m.attr("CHUNK_RANKS") = fedms::kRanks;
    py::class_<Call>(m, "Call", py::module_local())
        .def(py::init<int, int64_t, int64_t, int64_t, int64_t, int, int, const Ints&, const Ints&,
                      const Ints&, const Ints&, const Ints&, const std::vector<double>&, int64_t,
                      int64_t, int, int64_t, int64_t, int64_t, int, int,
                      const std::array<int64_t, 5>&, double, int64_t>());
    m.def("shrink", &shrink, unlocked);
    m.def("expand", &expand, unlocked);
    m.def("combine", &combine, unlocked);
    m.def("outer", &outer, unlocked);
    m.def("upload", &upload, unlocked);
    m.def("expert_words", &expert_words);
    m.def("state", &state);
#ifdef FEDMS_CUDA_HOST
    m.def("set_schedule", [](bool reverse) { fedms::host::schedule().reverse = reverse; });
#endif
}
