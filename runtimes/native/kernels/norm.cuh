// A layer norm or an RMS norm of a row: what it takes, and what is done with each word.

#ifndef MODCOMPILE_NORM_CUH_
#define MODCOMPILE_NORM_CUH_

#include "element.cuh"

namespace modcompile {

struct Norm {
  const void* weight;  // [D]
  const void* bias;    // [D], or null
  float epsilon;
  bool centered;  // a layer norm; otherwise the mean square is divided by
};

// The sum over a warp, or over each kLanes of its lanes.
template <int kLanes = kWarp>
__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Adds the squares of a word's deviations from the mean to a sum.
template <typename T, int kCount>
__device__ __forceinline__ void add_squares(Word<T, kCount> word, float mean, float& squares) {
  const auto elements = unpack<T, kCount>(word);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float deviation = to_float(elements.at[i]) - mean;
    squares = fmaf(deviation, deviation, squares);
  }
}

// The norm of a row's word number `at`, where the norm's weight is `weight_word`.
template <typename T, int kCount>
__device__ __forceinline__ Word<T, kCount> normed_word(Word<T, kCount> word, Word<T, kCount> weight_word,
                                                       const Norm& norm, int64_t at, float mean, float scale) {
  using Words = Word<T, kCount>;
  const auto* biases = static_cast<const Words*>(norm.bias);
  auto elements = unpack<T, kCount>(word);
  const auto weight = unpack<T, kCount>(weight_word);
  const auto bias = unpack<T, kCount>(biases != nullptr ? biases[at] : Words{});
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float scaled = (to_float(elements.at[i]) - mean) * scale;
    elements.at[i] = from_float<T>(fmaf(scaled, to_float(weight.at[i]), to_float(bias.at[i])));
  }
  return pack(elements);
}

}  // namespace modcompile

#endif  // MODCOMPILE_NORM_CUH_
