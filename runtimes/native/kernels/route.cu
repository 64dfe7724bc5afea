// route: one launch, one CTA for each batch row.

#include "modcompile_kernels.h"
#include "select_rows.cuh"

namespace modcompile {
namespace {

template <int kThreads, int kItems, bool kHeld>
__global__ void __launch_bounds__(kThreads)
    route_kernel(const float* logits, const uint8_t* valid, void* positions, int index_bytes, uint8_t* filled, int rows,
                 int capacity) {
  using Select = RowSelect<kThreads, kItems, kHeld>;
  __shared__ typename Select::Shared shared;
  const int64_t batch_row = blockIdx.x;
  const RouteRow row = {logits + batch_row * rows,
                        valid == nullptr ? nullptr : valid + batch_row * rows,
                        static_cast<char*>(positions) + batch_row * capacity * index_bytes,
                        index_bytes,
                        filled + batch_row * capacity,
                        rows,
                        capacity};
  Select(row, shared).run();
}

// A short row wants few warps, for then barriers and sums over warps are cheap; a long one wants its keys in registers,
// where 16 of them fit for each of 1024 threads. Longer rows are read from L2, once for each look at a key.
auto kernel_for(int64_t rows, int* threads) {
  *threads = rows <= 1024 ? 256 : rows <= 2048 ? 512 : 1024;
  if (rows <= 1024) return route_kernel<256, 4, true>;
  if (rows <= 2048) return route_kernel<512, 4, true>;
  if (rows <= 8192) return route_kernel<1024, 8, true>;
  if (rows <= 16384) return route_kernel<1024, 16, true>;
  return route_kernel<1024, 8, false>;
}

}  // namespace
}  // namespace modcompile

int modcompile_kernels_run_here() {
  int threads = 0;
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, modcompile::kernel_for(1, &threads));
}

int modcompile_route(const float* logits, const uint8_t* valid, void* positions, int index_bytes, uint8_t* filled,
                     int64_t batch, int64_t rows, int64_t capacity, cudaStream_t stream) {
  using namespace modcompile;
  if (!logits || !positions || !filled || !is_index_width(index_bytes) || batch < 0 || capacity < 1 ||
      capacity > rows || rows > kMostRows) {
    return cudaErrorInvalidValue;
  }
  if (batch == 0) return cudaSuccess;
  int threads = 0;
  const auto kernel = kernel_for(rows, &threads);
  return launch(kernel, batch, threads, stream, logits, valid, positions, index_bytes, filled, static_cast<int>(rows),
                static_cast<int>(capacity));
}
