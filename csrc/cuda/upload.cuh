// Host words into device memory by a kernel whose parameters carry them.
//
// A copy from pageable memory may wait for the device and cannot be captured into a CUDA graph;
// this is ordered on the stream like any launch, and a graph keeps the words. 3.5 KB a launch:
// meant for tables that are sent once.
#pragma once

#include "cuda/problem.cuh"

namespace fedms {

constexpr int kUploadWords = 448;

struct Upload {
    std::uint64_t words[kUploadWords];
    std::uint64_t* to;
    std::int32_t count;
};

Status launch_upload(const std::uint64_t* words, std::int64_t count, std::uint64_t* to,
                     cudaStream_t stream);

}  // namespace fedms
