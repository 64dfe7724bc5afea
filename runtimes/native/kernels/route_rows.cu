// A linear router fused in front of its route, in one launch.
//
// CTAs share the rows of a batch row and compute their logits; the one that finishes last selects. So the select costs
// no launch, and the CTAs of other batch rows stream on while it runs. The floor is reading x once: 8 x 1024 rows of
// 1024 float16 are 16.8 MB, 5.6 us at the 3.0 TB/s that a copy reaches on an H100.

#include "element.cuh"
#include "last_cta.cuh"
#include "modcompile_kernels.h"
#include "select_rows.cuh"

namespace modcompile {
namespace {

constexpr int kThreads = 512;  // the select would like 1024, the dot products smaller CTAs
constexpr int kWarps = kThreads / kWarp;
constexpr int kStepsAtOnce = 2;
constexpr int kMostRowsPerWarp = 4;  // that a warp computes at once: one load of the weight serves them all

// sum[r] = x[r] . weight for the `count` rows of a warp, which begin `width` apart; lanes take kPerLane elements in turn.
template <typename T, int kPerLane>
__device__ __forceinline__ void dot_rows(const T* __restrict__ x, const float* __restrict__ weight, int64_t width,
                                         int count, int lane, float (&sum)[kMostRowsPerWarp]) {
  constexpr int kPerWeight = kPerLane < 4 ? kPerLane : 4;
  constexpr int64_t kStep = kWarp * kPerLane;
  // Two steps at a time: eight loads in flight for each lane, for a warp waits for memory once a round.
#pragma unroll 1
  for (int64_t begin = lane * kPerLane; begin < width; begin += kStepsAtOnce * kStep) {
    Word<T, kPerLane> values[kStepsAtOnce][kMostRowsPerWarp] = {};
#pragma unroll
    for (int step = 0; step < kStepsAtOnce; ++step) {
      const int64_t at = begin + step * kStep;
#pragma unroll
      for (int r = 0; r < kMostRowsPerWarp; ++r) {
        if (r < count && at < width) {
          values[step][r] = *reinterpret_cast<const Word<T, kPerLane>*>(x + r * width + at);
        }
      }
    }
#pragma unroll
    for (int step = 0; step < kStepsAtOnce; ++step) {
      const int64_t at = begin + step * kStep;
      if (at >= width) break;
      float weights[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; i += kPerWeight) {
        const auto word = *reinterpret_cast<const Word<float, kPerWeight>*>(weight + at + i);
        const auto part = unpack<float, kPerWeight>(word);
#pragma unroll
        for (int j = 0; j < kPerWeight; ++j) weights[i + j] = part.at[j];
      }
#pragma unroll
      for (int r = 0; r < kMostRowsPerWarp; ++r) {
        const auto elements = unpack<T, kPerLane>(values[step][r]);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) sum[r] = fmaf(to_float(elements.at[i]), weights[i], sum[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kMostRowsPerWarp; ++r) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], offset);
    }
  }
}

struct Router {
  const float* weight;  // [D]
  const float* bias;    // [1]
  int64_t width;        // D
  bool wide;            // x and weight allow 16-byte loads
  int rows_per_warp;
  int ctas_per_batch_row;
};

template <typename T, int kItems, bool kHeld>
__global__ void __launch_bounds__(kThreads)
    route_rows_kernel(const T* x, Router router, const uint8_t* valid, float* logits, void* positions, int index_bytes,
                      uint8_t* filled, int rows, int capacity, uint32_t* finished) {
  using Select = RowSelect<kThreads, kItems, kHeld>;
  __shared__ typename Select::Shared shared;
  const int64_t batch_row = blockIdx.x / static_cast<unsigned>(router.ctas_per_batch_row);
  const int cta = static_cast<int>(blockIdx.x % static_cast<unsigned>(router.ctas_per_batch_row));
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;

  const int first = (cta * kWarps + warp) * router.rows_per_warp;
  const int count = min(router.rows_per_warp, rows - first);
  float* batch_logits = logits + batch_row * rows;  // [S]
  if (count > 0) {
    const T* warp_rows = x + (batch_row * rows + first) * router.width;
    float sum[kMostRowsPerWarp] = {};
    if (router.wide) {
      dot_rows<T, kPer16Bytes<T>>(warp_rows, router.weight, router.width, count, lane, sum);
    } else {
      dot_rows<T, 1>(warp_rows, router.weight, router.width, count, lane, sum);
    }
    const float bias = *router.bias;
#pragma unroll
    for (int r = 0; r < kMostRowsPerWarp; ++r) {
      if (lane == r && r < count) batch_logits[first + r] = sum[r] + bias;
    }
  }

  if (!is_last(finished + batch_row, static_cast<uint32_t>(router.ctas_per_batch_row))) return;
  const RouteRow row = {batch_logits,
                        valid == nullptr ? nullptr : valid + batch_row * rows,
                        static_cast<char*>(positions) + batch_row * capacity * index_bytes,
                        index_bytes,
                        filled + batch_row * capacity,
                        rows,
                        capacity};
  Select(row, shared).run();
}

template <typename T>
auto kernel_for(int64_t rows) {
  if (rows <= 2048) return route_rows_kernel<T, 4, true>;
  if (rows <= 8192) return route_rows_kernel<T, 16, true>;
  return route_rows_kernel<T, 8, false>;
}

}  // namespace
}  // namespace modcompile

size_t modcompile_route_rows_workspace(int64_t batch, int64_t rows) {
  return batch < 0 || rows < 1 ? 0 : static_cast<size_t>(batch) * sizeof(uint32_t);
}

int modcompile_route_rows(const void* x, int dtype, const float* weight, const float* bias, const uint8_t* valid,
                          float* logits, void* positions, int index_bytes, uint8_t* filled, int64_t batch, int64_t rows,
                          int64_t width, int64_t capacity, void* workspace, cudaStream_t stream) {
  using namespace modcompile;
  if (!x || !weight || !bias || !logits || !positions || !filled || !workspace || !is_index_width(index_bytes) ||
      batch < 0 || capacity < 1 || capacity > rows || rows > kMostRows || width < 1) {
    return cudaErrorInvalidValue;
  }
  return with_element(dtype, [&](auto type) -> cudaError_t {
    using T = typename decltype(type)::type;
    if (batch == 0) return cudaSuccess;
    int processors = 0;
    if (const cudaError_t error = multiprocessors(&processors)) return error;
    // Few rows are spread thin, so that every multiprocessor reads.
    const int64_t dealt = ceil_div(batch * rows, static_cast<int64_t>(processors) * kWarps);
    const int64_t rows_per_warp = dealt < kMostRowsPerWarp ? dealt : kMostRowsPerWarp;
    const int64_t ctas = ceil_div(rows, kWarps * rows_per_warp);
    const Router router = {weight,
                           bias,
                           width,
                           width % kPer16Bytes<T> == 0 && is_aligned(x, 16) && is_aligned(weight, 16),
                           static_cast<int>(rows_per_warp),
                           static_cast<int>(ctas)};
    return launch(kernel_for<T>(rows), batch * ctas, kThreads, stream, static_cast<const T*>(x), router, valid, logits,
                  positions, index_bytes, filled, static_cast<int>(rows), static_cast<int>(capacity),
                  static_cast<uint32_t*>(workspace));
  });
}
