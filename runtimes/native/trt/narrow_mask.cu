#include "narrow_mask.h"

#include "launch.cuh"

namespace modcompile {
namespace {

constexpr int kThreads = 256;

__global__ void narrow_mask_kernel(const int32_t* mask, uint8_t* narrow, int64_t count) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + static_cast<int>(threadIdx.x);
  if (index < count) narrow[index] = mask[index] != 0;
}

}  // namespace

cudaError_t narrow_mask(const int32_t* mask, uint8_t* narrow, int64_t count, cudaStream_t stream) {
  return launch(narrow_mask_kernel, ceil_div<int64_t>(count, kThreads), kThreads, stream, mask, narrow, count);
}

}  // namespace modcompile
