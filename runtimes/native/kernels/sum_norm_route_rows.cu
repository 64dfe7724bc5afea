// What stands between a dense block and a routed one, in one launch: the sum of the residual stream and the block's last
// product, its norm for the block after, the router's logits, and the route.
//
// A warp takes a row, and keeps the sum in registers where they suffice: the row is read once, for the norm and for the
// logits. The CTA that finishes last in its batch row selects. The floor is reading two tensors and writing two.

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "last_cta.cuh"
#include "modcompile_kernels.h"
#include "norm.cuh"
#include "select_rows.cuh"

namespace modcompile {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFewWords = 4;   // of a lane, so that two CTAs fit a multiprocessor
constexpr int kMostWords = 8;  // of a lane in registers; of a wider row the sum is read again
constexpr int kMostRowsPerWarp = 4;

struct Sources {
  const void* residual;      // [B, S, D]
  const void* product;       // [B, S, D]
  const void* product_bias;  // [D], or null
};

struct Router {
  const float* weight;  // [D]
  const float* bias;    // [1]
};

struct Targets {
  void* summed;     // [B, S, D]
  void* normed;     // [B, S, D]
  float* logits;    // [B, S]
  void* positions;  // [B, K] of index_bytes
  int index_bytes;
  uint8_t* filled;  // [B, K]
};

struct Sizes {
  int64_t words;  // of a row
  int rows;       // S
  int capacity;   // K
  int rows_per_warp;
  int ctas_per_batch_row;
};

// A lane's words of a summed row: in registers, or with kHeld = 0 where they are written.
template <typename T, int kCount, int kHeld>
class SummedRow {
 public:
  using Words = Word<T, kCount>;

  // Adds up the row, and writes it.
  __device__ SummedRow(const Words* residual, const Words* product, const Words* bias, Words* summed, int64_t words,
                       int lane)
      : summed_(summed), words_(words), lane_(lane) {
    if constexpr (kHeld > 0) {
      Words products[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t at = lane + i * kWarp;
        if (at >= words) break;
        held_[i] = residual[at];
        products[i] = product[at];
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t at = lane + i * kWarp;
        if (at >= words) break;
        held_[i] = added(held_[i], products[i], bias, at);
        summed[at] = held_[i];
      }
    } else {
      for (int64_t at = lane; at < words; at += kWarp) summed[at] = added(residual[at], product[at], bias, at);
    }
  }

  // Calls visit(word's number, word).
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t at = lane_ + i * kWarp;
        if (at >= words_) break;
        visit(at, held_[i]);
      }
    } else {
      for (int64_t at = lane_; at < words_; at += kWarp) visit(at, summed_[at]);
    }
  }

 private:
  // In float32, rounded once.
  static __device__ __forceinline__ Words added(Words residual, Words product, const Words* bias, int64_t at) {
    auto sum = unpack<T, kCount>(residual);
    const auto other = unpack<T, kCount>(product);
    const auto third = unpack<T, kCount>(bias != nullptr ? bias[at] : Words{});
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float product_and_bias = to_float(other.at[i]) + to_float(third.at[i]);
      sum.at[i] = from_float<T>(to_float(sum.at[i]) + product_and_bias);
    }
    return pack(sum);
  }

  Words held_[kHeld > 0 ? kHeld : 1];
  Words* summed_;
  int64_t words_;
  int lane_;
};

// A row's sum, its norm and its logit, by a warp.
template <typename T, int kCount, int kHeld>
__device__ void make_row(const Sources& sources, const Norm& norm, const Router& router, const Targets& targets,
                         int64_t words, int64_t row, int lane) {
  using Words = Word<T, kCount>;
  const SummedRow<T, kCount, kHeld> sums(static_cast<const Words*>(sources.residual) + row * words,
                                         static_cast<const Words*>(sources.product) + row * words,
                                         static_cast<const Words*>(sources.product_bias),
                                         static_cast<Words*>(targets.summed) + row * words, words, lane);
  const float width = static_cast<float>(words * kCount);
  constexpr int kPerLoad = kCount < 4 ? kCount : 4;
  const auto* router_weights = reinterpret_cast<const Word<float, kPerLoad>*>(router.weight);
  float mean = 0, logit = 0;
  sums.each([&](int64_t at, Words word) {
    const auto elements = unpack<T, kCount>(word);
#pragma unroll
    for (int i = 0; i < kCount; i += kPerLoad) {
      const auto weight = unpack<float, kPerLoad>(router_weights[(at * kCount + i) / kPerLoad]);
#pragma unroll
      for (int j = 0; j < kPerLoad; ++j) {
        const float value = to_float(elements.at[i + j]);
        mean += value;
        logit = fmaf(value, weight.at[j], logit);
      }
    }
  });
  logit = sum_of_lanes(logit);
  if (lane == 0) targets.logits[row] = logit + *router.bias;
  mean = norm.centered ? sum_of_lanes(mean) / width : 0;

  float squares = 0;
  sums.each([&](int64_t, Words word) { add_squares<T, kCount>(word, mean, squares); });
  const float scale = scale_of(squares, width, norm.epsilon);

  Words* normed = static_cast<Words*>(targets.normed) + row * words;
  const auto* weights = static_cast<const Words*>(norm.weight);
  sums.each([&](int64_t at, Words word) {
    normed[at] = normed_word<T, kCount>(word, weights[at], norm, at, mean, scale);
  });
}

template <typename T, int kCount, int kHeld, int kItems, bool kSelectHeld>
__global__ void __launch_bounds__(kThreads, kHeld == kFewWords ? 2 : 1)
    sum_norm_route_rows_kernel(Sources sources, Norm norm, Router router, const uint8_t* valid, Targets targets,
                               Sizes sizes, uint32_t* finished) {
  using Select = RowSelect<kThreads, kItems, kSelectHeld>;
  __shared__ typename Select::Shared shared;
  const int64_t batch_row = blockIdx.x / static_cast<unsigned>(sizes.ctas_per_batch_row);
  const int cta = static_cast<int>(blockIdx.x % static_cast<unsigned>(sizes.ctas_per_batch_row));
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;

  const int first = (cta * kWarps + warp) * sizes.rows_per_warp;
  const int end = min(first + sizes.rows_per_warp, sizes.rows);
  for (int row = first; row < end; ++row) {
    make_row<T, kCount, kHeld>(sources, norm, router, targets, sizes.words, batch_row * sizes.rows + row, lane);
  }

  if (!is_last(finished + batch_row, static_cast<uint32_t>(sizes.ctas_per_batch_row))) return;
  const RouteRow row = {targets.logits + batch_row * sizes.rows,
                        valid == nullptr ? nullptr : valid + batch_row * sizes.rows,
                        static_cast<char*>(targets.positions) + batch_row * sizes.capacity * targets.index_bytes,
                        targets.index_bytes,
                        targets.filled + batch_row * sizes.capacity,
                        sizes.rows,
                        sizes.capacity};
  Select(row, shared).run();
}

template <typename T, int kCount, int kHeld>
auto kernel_for(int64_t rows) {
  return rows <= 4 * kThreads ? sum_norm_route_rows_kernel<T, kCount, kHeld, 4, true>
                              : sum_norm_route_rows_kernel<T, kCount, kHeld, 8, false>;
}

}  // namespace
}  // namespace modcompile

int modcompile_sum_norm_route_rows(const void* residual, const void* product, const void* product_bias, int dtype,
                                   const void* norm_weight, const void* norm_bias, float epsilon, int centered,
                                   const float* weight, const float* bias, const uint8_t* valid, void* summed,
                                   void* normed, float* logits, void* positions, int index_bytes, uint8_t* filled,
                                   int64_t batch, int64_t rows, int64_t width, int64_t capacity, void* workspace,
                                   cudaStream_t stream) {
  using namespace modcompile;
  if (!residual || !product || !norm_weight || !weight || !bias || !summed || !normed || !logits || !positions ||
      !filled || !workspace || !is_index_width(index_bytes) || batch < 0 || capacity < 1 || capacity > rows ||
      rows > kMostRows || width < 1) {
    return cudaErrorInvalidValue;
  }
  return with_element(dtype, [&](auto type) -> cudaError_t {
    using T = typename decltype(type)::type;
    constexpr int kWide = kPer16Bytes<T>;
    if (batch == 0) return cudaSuccess;
    int processors = 0;
    if (const cudaError_t error = multiprocessors(&processors)) return error;
    // Two CTAs a multiprocessor, each with as many rows as that leaves to it.
    const int64_t rows_per_warp = std::clamp<int64_t>(
        ceil_div(batch * rows, static_cast<int64_t>(processors) * 2 * kWarps), 1, kMostRowsPerWarp);
    const int64_t ctas = ceil_div(rows, kWarps * rows_per_warp);
    const auto run = [&](auto count, auto held) {
      constexpr int kCount = decltype(count)::value;
      return launch(kernel_for<T, kCount, decltype(held)::value>(rows), batch * ctas, kThreads, stream,
                    Sources{residual, product, product_bias}, Norm{norm_weight, norm_bias, epsilon, centered != 0},
                    Router{weight, bias}, valid, Targets{summed, normed, logits, positions, index_bytes, filled},
                    Sizes{width / kCount, static_cast<int>(rows), static_cast<int>(capacity),
                          static_cast<int>(rows_per_warp), static_cast<int>(ctas)},
                    static_cast<uint32_t*>(workspace));
    };
    const void* const tensors[] = {residual, product, product_bias, norm_weight, norm_bias, weight, summed, normed};
    const bool wide = width % kWide == 0 && std::all_of(std::begin(tensors), std::end(tensors),
                                                        [](const void* p) { return is_aligned(p, 16); });
    const auto wide_count = std::integral_constant<int, kWide>();
    if (wide && width <= kFewWords * kWarp * kWide) return run(wide_count, std::integral_constant<int, kFewWords>());
    if (wide && width <= kMostWords * kWarp * kWide) return run(wide_count, std::integral_constant<int, kMostWords>());
    if (wide) return run(wide_count, std::integral_constant<int, 0>());
    return run(std::integral_constant<int, 1>(), std::integral_constant<int, 0>());
  });
}
