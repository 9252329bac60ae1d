// Python module fedms.kernels._C_cuda: pointers as integers, sizes, a stream handle. No arithmetic.
//
// cudart is linked statically, so the module imports on a machine without a driver: state() says
// whether it can run, and forward() raises RuntimeError when it cannot.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/gated_lora.cuh"

namespace py = pybind11;
using std::int64_t;

namespace {

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(address);
}

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("fedms.kernels._C_cuda cannot run: ") +
                             cudaGetErrorString(error));
}

std::string state() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) return std::string("built, cannot run: ") + cudaGetErrorString(error);
    return "built, " + std::to_string(devices) + " device(s); not chosen by the plan";
}

void forward(int64_t stream, int64_t x, int64_t y, int64_t a, int64_t b, int64_t h, int64_t gates,
             int64_t gate_row, int64_t gate_col, int64_t expert_of_rank, int64_t scale_of_rank,
             int64_t m, int64_t k, int64_t n, int64_t r, bool bf16) {
    int devices = 0;
    check(cudaGetDeviceCount(&devices));
    const fedms::CudaForward call{pointer<const void>(x),
                                  pointer<void>(y),
                                  pointer<const float>(a),
                                  pointer<const float>(b),
                                  pointer<float>(h),
                                  pointer<const float>(gates),
                                  gate_row,
                                  gate_col,
                                  pointer<const std::int32_t>(expert_of_rank),
                                  pointer<const float>(scale_of_rank),
                                  m,
                                  k,
                                  n,
                                  r,
                                  bf16};
    check(fedms::launch_gated_lora_forward(call, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
    m.doc() = "CUDA kernels of fedms on raw pointers.";
    m.def("state", &state);
    m.def("runtime_version", [] { return CUDART_VERSION; });
    m.def("forward", &forward, py::call_guard<py::gil_scoped_release>());
}
