// See upload.cuh.
#include "cuda/upload.cuh"

#include <algorithm>

#include "cuda/launch.cuh"

namespace fedms {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) upload(const __grid_constant__ Upload call) {
    for (int i = threadIdx.x; i < call.count; i += kThreads) call.to[i] = call.words[i];
}

}  // namespace

Status launch_upload(const std::uint64_t* words, std::int64_t count, std::uint64_t* to,
                     cudaStream_t stream) {
    Status status{"upload", cudaSuccess, dim3(1)};
    for (std::int64_t at = 0; at < count && status.error == cudaSuccess; at += kUploadWords) {
        Upload call{};
        call.to = to + at;
        call.count = static_cast<std::int32_t>(std::min<std::int64_t>(kUploadWords, count - at));
        std::copy_n(words + at, call.count, call.words);
        status = launch("upload", upload, Grid{1, 1}, kThreads, stream, call);
    }
    return status;
}

}  // namespace fedms
