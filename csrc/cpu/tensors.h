// Torch tensors as the binding reads them, without a torch header: DLPack's C exchange functions,
// which the type torch.Tensor carries, describe a tensor in plain C within some 10 ns. The same
// attributes read from Python take 50 ns each.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace fedms {

namespace py = pybind11;

// DLPack 1.x's DLTensor. The arrays belong to the tensor.
struct View {
    void* data = nullptr;
    std::int32_t device_type = 0, device_id = 0, ndim = 0;
    std::uint8_t code = 0, bits = 0;
    std::uint16_t lanes = 0;
    const std::int64_t* shape = nullptr;
    const std::int64_t* strides = nullptr;
    std::uint64_t byte_offset = 0;

    bool is_bf16() const { return bits == 16; }  // of the dtypes that the binding is given
    std::int64_t size(int from_the_end) const { return shape[ndim - from_the_end]; }

    std::int64_t rows() const {
        std::int64_t count = 1;
        for (int i = 0; i < ndim - 1; ++i) count *= shape[i];
        return count;
    }

    template <class T>
    T* at(std::int64_t element = 0) const {
        return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset + element * (bits / 8));
    }

    bool is_contiguous() const {
        std::int64_t step = 1;
        for (int i = ndim - 1; i >= 0; --i) {
            if (shape[i] > 1 && strides[i] != step) return is_empty();
            step *= shape[i];
        }
        return true;
    }

    bool is_empty() const {
        for (int i = 0; i < ndim; ++i) {
            if (shape[i] == 0) return true;
        }
        return false;
    }
};

// DLPack 1.x's table of exchange functions, as far as it is used here.
struct Exchange {
    std::uint32_t major, minor;
    const Exchange* older;
    void *allocate, *own, *wrap;
    int (*view)(void* object, View* out);
    void* stream;
};

inline const Exchange*& exchange_slot() {
    static const Exchange* slot = nullptr;
    return slot;
}

// torch.Tensor.__dlpack_c_exchange_api__. Throws where this torch has none that is known here.
inline void set_exchange(const py::capsule& table) {
    constexpr std::uint32_t kMajor = 1;
    const auto* found = static_cast<const Exchange*>(table.get_pointer());
    while (found != nullptr && found->major != kMajor) found = found->older;
    if (found == nullptr || found->view == nullptr) {
        throw std::runtime_error("this torch exchanges no tensors by DLPack 1");
    }
    exchange_slot() = found;
}

// Reads the arguments of one call and keeps the copies that it had to make of them.
class Reader {
  public:
    // The tensor as it is; all zero for None. Throws where there is no memory to read: a layout that
    // is not strided, storage that was freed, a tensor that stands for zeros or for other tensors.
    View view(py::handle tensor) const {
        View out;
        if (tensor.is_none()) return out;
        const bool found = exchange_slot()->view(tensor.ptr(), &out) == 0;
        if (!found) PyErr_Clear();
        if (!found || out.device_type != kCpu || lacks_memory(tensor, out)) refuse(tensor);
        return out;
    }

    // The tensor or a contiguous copy.
    View rows(py::handle tensor) {
        const View out = view(tensor);
        if (out.data == nullptr || out.is_contiguous()) return out;
        copies_.push_back(tensor.attr("contiguous")());
        return view(copies_.back());
    }

  private:
    static constexpr std::int32_t kCpu = 1;  // DLPack's kDLCPU

    // A part of freed storage points at its offset there. Asking for the offset takes longer than
    // all the rest, so it is left where the address is higher than any offset could be.
    static bool lacks_memory(py::handle tensor, const View& view) {
        constexpr std::uint64_t kTerabyte = std::uint64_t{1} << 40;
        const auto address = reinterpret_cast<std::uintptr_t>(view.data);
        if (address >= kTerabyte || view.is_empty()) return false;
        return address == tensor.attr("storage_offset")().cast<std::uint64_t>() * (view.bits / 8);
    }

    [[noreturn]] static void refuse(py::handle tensor) {
        const py::str message(
            "tensors must be strided, on the CPU and have memory, got a {} {} {} on {} without");
        throw std::runtime_error(
            message.format(py::type::of(tensor).attr("__name__"), tensor.attr("layout"),
                           py::list(tensor.attr("shape")), tensor.attr("device")));
    }

    std::vector<py::object> copies_;
};

}  // namespace fedms
