// What every kernel file needs: the launch, indices of two widths, and sizes that are checked.

#ifndef MODCOMPILE_LAUNCH_CUH_
#define MODCOMPILE_LAUNCH_CUH_

#include <cuda_runtime.h>
#include <stdint.h>

namespace modcompile {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid's first dim

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// Launches, and returns this launch's own error: cudaGetLastError() would report an earlier one of someone else's too.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   Arguments... arguments) {
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline cudaError_t multiprocessors(int* count) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Positions are int64 or, for runtimes that have none, int32. The branch is the same for every thread.
inline bool is_index_width(int bytes) { return bytes == 4 || bytes == 8; }

__device__ __forceinline__ int64_t load_index(const void* indices, int64_t at, int bytes) {
  return bytes == 8 ? static_cast<const int64_t*>(indices)[at] : static_cast<const int32_t*>(indices)[at];
}

__device__ __forceinline__ void store_index(void* indices, int64_t at, int bytes, int32_t value) {
  if (bytes == 8) {
    static_cast<int64_t*>(indices)[at] = value;
  } else {
    static_cast<int32_t*>(indices)[at] = value;
  }
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace modcompile

#endif  // MODCOMPILE_LAUNCH_CUH_
