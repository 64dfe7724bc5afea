// What stands between a dense block and a routed one, in one launch: the sum of the residual stream and the block's last
// product, its norm for the block after, the router's logits, and the route.
//
// A team of warps takes a row, and keeps the sum in registers where they suffice: the row is read once, for the norm and
// for the logits. A lane holds one word or two, so that two or three CTAs fit a multiprocessor, and some of their warps
// load while others reduce or store; with a row to a warp, all of them did each of these at the same time. The CTA that
// finishes last in its batch row selects. The floor is reading two tensors and writing two: for 8 x 1024 rows of 1024
// float16 67 MB, 22 us at the 3.0 TB/s that a copy reaches on an H100.

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
constexpr int kMostTeam = 8;         // warps
constexpr int kMostHeld = 2;         // words of a lane in registers; of a wider row the sum is read again
constexpr int kCtasPerBatchRow = 4;  // at least, where there are rows for them

// So many CTAs fit a multiprocessor where a lane holds kHeld words: three with 40 registers a thread, two with 64.
template <int kHeld>
constexpr int kCtas = kHeld == 1 ? 3 : 2;

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
  int ctas_per_batch_row;
  float per_element;  // 1 / D
};

// Words of a row that a thread of its team has: every kStride-th from its own number on. They are in registers, or with
// kHeld = 0 where they are written.
template <typename T, int kCount, int kStride, int kHeld>
class SummedRow {
 public:
  using Words = Word<T, kCount>;
  using Index = std::conditional_t<(kHeld > 0), int, int64_t>;

  // Adds up the words, and writes them.
  __device__ SummedRow(const Words* residual, const Words* product, const Words* bias, Words* summed, int64_t words,
                       int thread)
      : summed_(summed), words_(static_cast<Index>(words)), thread_(thread) {
    if constexpr (kHeld > 0) {
      Words products[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const Index at = thread + i * kStride;
        if (at >= words_) break;
        held_[i] = residual[at];
        products[i] = product[at];
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const Index at = thread + i * kStride;
        if (at >= words_) break;
        held_[i] = added(held_[i], products[i], bias, at);
        summed[at] = held_[i];
      }
    } else {
      for (Index at = thread; at < words_; at += kStride) summed[at] = added(residual[at], product[at], bias, at);
    }
  }

  // Calls visit(word's number, word).
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const Index at = thread_ + i * kStride;
        if (at >= words_) break;
        visit(at, held_[i]);
      }
    } else {
      for (Index at = thread_; at < words_; at += kStride) visit(at, summed_[at]);
    }
  }

 private:
  // In float32, rounded once.
  static __device__ __forceinline__ Words added(Words residual, Words product, const Words* bias, Index at) {
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
  Index words_;
  int thread_;
};

// What a warp finds in its words of a row.
struct alignas(16) Part {
  float logit;
  float count;    // of elements
  float mean;     // of them; 0 for an RMS norm
  float squares;  // of their deviations from that mean, added up
};

// The number of a row's words that a warp of its team has.
template <int kTeam>
__device__ __forceinline__ int64_t words_of_warp(int64_t words, int warp_of_team) {
  constexpr int kStride = kTeam * kWarp;
  const int last_round = static_cast<int>(words % kStride) - warp_of_team * kWarp;
  return words / kStride * kWarp + min(max(last_round, 0), kWarp);
}

// A row's sum, its norm and its logit, by a team of kTeam warps. All teams of the CTA come together: one for which no row
// exists too.
template <typename T, int kCount, int kTeam, int kHeld>
__device__ void make_row(const Sources& sources, const Norm& norm, const Router& router, const Targets& targets,
                         const Sizes& sizes, int64_t row, bool exists, float count, float per_counted, Part* parts) {
  using Words = Word<T, kCount>;
  const int thread = static_cast<int>(threadIdx.x % (kTeam * kWarp));
  const int64_t first = row * sizes.words;
  const SummedRow<T, kCount, kTeam * kWarp, kHeld> sums(
      static_cast<const Words*>(sources.residual) + first, static_cast<const Words*>(sources.product) + first,
      static_cast<const Words*>(sources.product_bias), static_cast<Words*>(targets.summed) + first,
      exists ? sizes.words : 0, thread);

  constexpr int kPerLoad = kCount < 4 ? kCount : 4;
  const auto* router_weights = reinterpret_cast<const Word<float, kPerLoad>*>(router.weight);
  float logit = 0, sum = 0;
  sums.each([&](auto at, Words word) {
    const auto elements = unpack<T, kCount>(word);
#pragma unroll
    for (int i = 0; i < kCount; i += kPerLoad) {
      const auto weight = unpack<float, kPerLoad>(router_weights[at * (kCount / kPerLoad) + i / kPerLoad]);
#pragma unroll
      for (int j = 0; j < kPerLoad; ++j) {
        const float value = to_float(elements.at[i + j]);
        sum += value;
        logit = fmaf(value, weight.at[j], logit);
      }
    }
  });
  logit = sum_of_lanes(logit);
  sum = sum_of_lanes(sum);
  float mean = norm.centered ? sum * per_counted : 0;
  float squares = 0;
  sums.each([&](auto, Words word) { add_squares<T, kCount>(word, mean, squares); });
  squares = sum_of_lanes(squares);

  if constexpr (kTeam > 1) {
    const int warp = static_cast<int>(threadIdx.x / kWarp);
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    if (lane == 0) parts[warp] = {logit, count, mean, squares};
    __syncthreads();
    // Each lane has one of the team's parts. The formula for squares about different means is Chan, Golub and LeVeque's;
    // of the mean square less the square of the mean, no digit would be left where rows are far from zero.
    const Part part = parts[warp / kTeam * kTeam + lane % kTeam];
    logit = sum_of_lanes<kTeam>(part.logit);
    mean = sum_of_lanes<kTeam>(part.count * part.mean) * sizes.per_element;
    const float apart = part.mean - mean;
    squares = sum_of_lanes<kTeam>(fmaf(part.count * apart, apart, part.squares));
  }

  if (thread == 0 && exists) targets.logits[row] = logit + *router.bias;
  const float scale = rsqrtf(squares * sizes.per_element + norm.epsilon);
  Words* normed = static_cast<Words*>(targets.normed) + first;
  const auto* weights = static_cast<const Words*>(norm.weight);
  sums.each([&](auto at, Words word) {
    normed[at] = normed_word<T, kCount>(word, weights[at], norm, at, mean, scale);
  });
}

template <typename T, int kCount, int kTeam, int kHeld, int kItems, bool kSelectHeld>
__global__ void __launch_bounds__(kThreads, kCtas<kHeld>)
    sum_norm_route_rows_kernel(Sources sources, Norm norm, Router router, const uint8_t* valid, Targets targets,
                               Sizes sizes, uint32_t* finished) {
  using Select = RowSelect<kThreads, kItems, kSelectHeld>;
  constexpr int kTeams = kWarps / kTeam;
  __shared__ typename Select::Shared shared;
  __shared__ Part parts[2][kWarps];  // in turn: one barrier a row, and no warp writes what another may still read
  const int64_t batch_row = blockIdx.x / static_cast<unsigned>(sizes.ctas_per_batch_row);
  const int cta = static_cast<int>(blockIdx.x % static_cast<unsigned>(sizes.ctas_per_batch_row));
  const int warp = static_cast<int>(threadIdx.x / kWarp);

  const float count = static_cast<float>(words_of_warp<kTeam>(sizes.words, warp % kTeam) * kCount);
  const float per_counted = 1.0f / fmaxf(count, 1.0f);
  int turn = 0;
#pragma unroll 1
  for (int first = cta * kTeams; first < sizes.rows; first += sizes.ctas_per_batch_row * kTeams) {
    const int row = first + warp / kTeam;
    make_row<T, kCount, kTeam, kHeld>(sources, norm, router, targets, sizes, batch_row * sizes.rows + row,
                                      row < sizes.rows, count, per_counted, parts[turn]);
    turn ^= 1;
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

template <int kValue>
using Number = std::integral_constant<int, kValue>;

template <typename T, int kCount, int kTeam, int kHeld>
auto kernel_for(int64_t rows) {
  return rows <= 4 * kThreads ? sum_norm_route_rows_kernel<T, kCount, kTeam, kHeld, 4, true>
                              : sum_norm_route_rows_kernel<T, kCount, kTeam, kHeld, 8, false>;
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
    const auto run = [&](auto count, auto team, auto held) {
      constexpr int kCount = decltype(count)::value, kTeam = decltype(team)::value, kHeld = decltype(held)::value;
      // The CTAs that fit at once, shared among the batch rows. Where few would come to each, several times as many: a
      // share is rounded down, and what is left of them stands idle.
      const int64_t fit = static_cast<int64_t>(processors) * kCtas<kHeld>;
      const int64_t ctas = std::min(ceil_div(batch * kCtasPerBatchRow, fit) * fit / batch,
                                    ceil_div<int64_t>(rows, kWarps / kTeam));
      return launch(kernel_for<T, kCount, kTeam, kHeld>(rows), batch * ctas, kThreads, stream,
                    Sources{residual, product, product_bias}, Norm{norm_weight, norm_bias, epsilon, centered != 0},
                    Router{weight, bias}, valid, Targets{summed, normed, logits, positions, index_bytes, filled},
                    Sizes{width / kCount, static_cast<int>(rows), static_cast<int>(capacity), static_cast<int>(ctas),
                          1.0f / static_cast<float>(width)},
                    static_cast<uint32_t*>(workspace));
    };
    const void* const tensors[] = {residual, product, product_bias, norm_weight, norm_bias, weight, summed, normed};
    const bool wide = width % kWide == 0 && std::all_of(std::begin(tensors), std::end(tensors),
                                                        [](const void* p) { return is_aligned(p, 16); });
    const Number<kMostTeam> most{};
    if (!wide) return run(Number<1>(), most, Number<0>());
    const Number<kWide> many{};
    const int64_t words = width / kWide;
    if (words <= kWarp) return run(many, Number<1>(), Number<1>());
    if (words <= 2 * kWarp) return run(many, Number<2>(), Number<1>());
    if (words <= 4 * kWarp) return run(many, Number<4>(), Number<1>());
    if (words <= 4 * kWarp * kMostHeld) return run(many, Number<4>(), Number<kMostHeld>());
    if (words <= kMostTeam * kWarp * kMostHeld) return run(many, most, Number<kMostHeld>());
    return run(many, most, Number<0>());
  });
}
