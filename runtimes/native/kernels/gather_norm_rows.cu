// gather_norm_rows: the chosen rows, packed, and their norm, with one reading of memory. The floor is that of
// gather_rows and writing the norms.
//
// A warp takes a row, and goes over it three times: for the mean, for the variance, and to write. The first time brings
// the row into L1. So no barrier is waited for, and a row may be of any width.

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "modcompile_kernels.h"
#include "norm.cuh"

namespace modcompile {
namespace {

constexpr int kThreads = 128;  // few, so that K rows are on all multiprocessors
constexpr int kInFlight = 4;   // words of a row that a lane loads before it uses the first

// Calls visit(word's number, word) for a lane's words of a row.
template <typename Word, typename Visit>
__device__ __forceinline__ void each_word(const Word* row, int64_t words, int lane, Visit visit) {
  for (int64_t first = lane; first < words; first += kInFlight * kWarp) {
    Word held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kWarp < words) held[i] = row[first + i * kWarp];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kWarp < words) visit(first + i * kWarp, held[i]);
    }
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads)
    gather_norm_rows_kernel(const Word<T, kCount>* __restrict__ x, const void* __restrict__ positions, int index_bytes,
                            Norm norm, Word<T, kCount>* __restrict__ out, Word<T, kCount>* __restrict__ normed,
                            int64_t slots, int64_t rows, int64_t capacity, int64_t words) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t slot = blockIdx.x * static_cast<int64_t>(kThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
  if (slot >= slots) return;
  const int64_t position = load_index(positions, slot, index_bytes);
  const bool exists = 0 <= position && position < rows;
  const Word<T, kCount>* row = x + (slot / capacity * rows + (exists ? position : 0)) * words;
  const int64_t read = exists ? words : 0;
  const float width = static_cast<float>(words * kCount);

  float mean = 0;
  if (norm.centered) {
    each_word(row, read, lane, [&](int64_t, Word<T, kCount> word) {
      const auto elements = unpack<T, kCount>(word);
#pragma unroll
      for (int i = 0; i < kCount; ++i) mean += to_float(elements.at[i]);
    });
    mean = sum_of_lanes(mean) / width;
  }
  float squares = 0;
  each_word(row, read, lane, [&](int64_t, Word<T, kCount> word) { add_squares<T, kCount>(word, mean, squares); });
  const float scale = rsqrtf(sum_of_lanes(squares) / width + norm.epsilon);

  const auto* weights = static_cast<const Word<T, kCount>*>(norm.weight);
  each_word(weights, words, lane, [&](int64_t at, Word<T, kCount> weight) {
    const Word<T, kCount> word = exists ? row[at] : Word<T, kCount>{};
    out[slot * words + at] = word;
    normed[slot * words + at] = normed_word<T, kCount>(word, weight, norm, at, mean, scale);
  });
}

}  // namespace
}  // namespace modcompile

int modcompile_gather_norm_rows(const void* x, int dtype, const void* positions, int index_bytes, const void* weight,
                                const void* bias, float epsilon, int centered, void* out, void* normed, int64_t batch,
                                int64_t rows, int64_t capacity, int64_t width, cudaStream_t stream) {
  using namespace modcompile;
  if (!x || !positions || !weight || !out || !normed || !is_index_width(index_bytes) || batch < 0 || capacity < 1 ||
      capacity > rows || width < 1) {
    return cudaErrorInvalidValue;
  }
  return with_element(dtype, [&](auto type) -> cudaError_t {
    using T = typename decltype(type)::type;
    constexpr int kWide = kPer16Bytes<T>;
    if (batch == 0) return cudaSuccess;
    const auto run = [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      using Words = Word<T, kCount>;
      const int64_t slots = batch * capacity;
      return launch(gather_norm_rows_kernel<T, kCount>, ceil_div<int64_t>(slots, kThreads / kWarp), kThreads, stream,
                    static_cast<const Words*>(x), positions, index_bytes,
                    Norm{weight, bias, epsilon, centered != 0}, static_cast<Words*>(out), static_cast<Words*>(normed),
                    slots, rows, capacity, width / kCount);
    };
    const void* const tensors[] = {x, weight, bias, out, normed};
    const bool wide = width % kWide == 0 &&
                      std::all_of(std::begin(tensors), std::end(tensors), [](const void* p) { return is_aligned(p, 16); });
    return wide ? run(std::integral_constant<int, kWide>()) : run(std::integral_constant<int, 1>());
  });
}
