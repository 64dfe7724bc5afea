// merge_rows: x + gate * (y - x) at the chosen rows. In place it touches those rows alone; out of place it is one
// streaming pass: each row of the output is written once, by the warp that finds out whether it is chosen.
//
// The floor out of place is reading x and the chosen rows of y and writing the output: for 8 x 2048 rows of 2048
// bfloat16 with one in eight chosen 143 MB, 48 us at the 3.0 TB/s that a copy reaches on an H100.

#include <algorithm>

#include "element.cuh"
#include "modcompile_kernels.h"

namespace modcompile {
namespace {

constexpr int kThreads = 256;
constexpr int kCtasPerProcessor = 4;  // holds the compiler to 64 registers: enough warps to keep memory busy
constexpr int kInFlight = 4;  // words of a row, or of each of two, that a lane loads before it stores the first

// x + gate * (y - x), each step rounded to T as in the reference. float32 holds the exact difference and product of two
// float16 or bfloat16, or rounds them so little that rounding once more to T gives what T's own arithmetic gives.
template <typename T>
__device__ __forceinline__ T mix(T x, T y, float gate) {
  const float difference = to_float(from_float<T>(__fsub_rn(to_float(y), to_float(x))));
  const float product = to_float(from_float<T>(__fmul_rn(gate, difference)));
  return from_float<T>(__fadd_rn(to_float(x), product));
}

template <typename T, int kCount>
__device__ __forceinline__ Word<T, kCount> mix_words(Word<T, kCount> x, Word<T, kCount> y, float gate) {
  Elements<T, kCount> mixed = unpack<T, kCount>(x);
  const Elements<T, kCount> updates = unpack<T, kCount>(y);
#pragma unroll
  for (int i = 0; i < kCount; ++i) mixed.at[i] = mix(mixed.at[i], updates.at[i], gate);
  return pack(mixed);
}

// A warp writes one row of `words` words; its gate says from which of x and y. x may be out.
template <typename T, int kCount>
__device__ __forceinline__ void merge_row(const Word<T, kCount>* x, const Word<T, kCount>* y, float gate,
                                          Word<T, kCount>* out, int64_t words, int lane) {
  const bool mixes = gate != 0 && gate != 1;  // true of a NaN
  const Word<T, kCount>* from = gate == 1 ? y : x;
  for (int64_t first = lane; first < words; first += kInFlight * kWarp) {
    Word<T, kCount> held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kWarp < words) held[i] = from[first + i * kWarp];
    }
    if (mixes) {
      Word<T, kCount> updates[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (first + i * kWarp < words) updates[i] = y[first + i * kWarp];
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) held[i] = mix_words<T, kCount>(held[i], updates[i], gate);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kWarp < words) out[first + i * kWarp] = held[i];
    }
  }
}

// A warp's number in the grid.
__device__ __forceinline__ int64_t warp_of_grid() {
  return blockIdx.x * static_cast<int64_t>(kThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
}

template <typename T, int kCount>
struct Updated {
  Word<T, kCount>* x;
  const Word<T, kCount>* y;
};

// One merge, or two at the same slots: `warps` is once or twice as many.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, kCtasPerProcessor)
    merge_in_place_kernel(Updated<T, kCount> first, Updated<T, kCount> second, int64_t warps, const void* positions,
                          int index_bytes, const T* gates, int64_t slots, int64_t rows, int64_t capacity,
                          int64_t words) {
  const int64_t warp = warp_of_grid();
  if (warp >= warps) return;
  const Updated<T, kCount> merged = warp < slots ? first : second;
  const int64_t slot = warp < slots ? warp : warp - slots;
  const int64_t position = load_index(positions, slot, index_bytes);
  const float gate = to_float(gates[slot]);
  if (gate == 0 || position < 0 || position >= rows) return;
  Word<T, kCount>* row = merged.x + (slot / capacity * rows + position) * words;
  merge_row<T, kCount>(row, merged.y + slot * words, gate, row, words, static_cast<int>(threadIdx.x) % kWarp);
}

// The first slot whose position is not below `row`, by all lanes together: each look cuts what is left in 32 parts, so
// 1024 slots take two. Positions ascend; whatever they hold, the result is in 0..capacity.
__device__ int64_t first_slot_from(const void* positions, int index_bytes, int64_t capacity, int64_t row, int lane) {
  int64_t low = 0, high = capacity;  // the result is in low..high
  while (low < high) {
    const int64_t part = ceil_div<int64_t>(high - low, kWarp);
    const int64_t last_of_part = low + (lane + 1) * part - 1;
    const bool below = last_of_part < high && load_index(positions, last_of_part, index_bytes) < row;
    low += __popc(__ballot_sync(kAllLanes, below)) * part;
    high = min(high, low + part - 1);
  }
  return low;
}

// A warp takes `rows_per_warp` consecutive rows, 32 at most. One search finds the first slot at or after them; the slots that
// could be theirs follow, and lanes hold one each.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, kCtasPerProcessor)
    merge_streaming_kernel(const Word<T, kCount>* __restrict__ x, const Word<T, kCount>* __restrict__ y,
                           const void* __restrict__ positions, int index_bytes, const T* __restrict__ gates,
                           Word<T, kCount>* __restrict__ out, int64_t rows, int64_t capacity, int64_t words,
                           int rows_per_warp, int64_t warps_per_batch_row, int64_t warps) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = warp_of_grid();
  if (warp >= warps) return;
  const int64_t batch_row = warp / warps_per_batch_row;
  const int64_t first = warp % warps_per_batch_row * rows_per_warp;
  const int64_t last = min(first + rows_per_warp, rows);

  const void* batch_positions = static_cast<const char*>(positions) + batch_row * capacity * index_bytes;
  const int64_t first_slot = first_slot_from(batch_positions, index_bytes, capacity, first, lane);
  const int64_t lane_slot = first_slot + lane;
  int64_t lane_position = -1;
  float lane_gate = 0;
  if (lane_slot < capacity) {
    lane_position = load_index(batch_positions, lane_slot, index_bytes);
    lane_gate = to_float(gates[batch_row * capacity + lane_slot]);
  }

  for (int64_t row = first; row < last; ++row) {
    const unsigned holders = __ballot_sync(kAllLanes, lane_position == row);
    const int holder = holders == 0 ? 0 : __ffs(static_cast<int>(holders)) - 1;
    const float gate = __shfl_sync(kAllLanes, lane_gate, holder);
    const int64_t offset = (batch_row * rows + row) * words;
    merge_row<T, kCount>(x + offset, y + (batch_row * capacity + first_slot + holder) * words, holders == 0 ? 0 : gate,
              out + offset, words, lane);
  }
}

// A merge's tensors, untyped.
struct Merge {
  const void* x;
  const void* y;
  void* out;

  bool in_place() const { return out == x; }
  bool is_complete() const { return x != nullptr && y != nullptr && out != nullptr; }
  bool is_wide(int64_t width, int64_t per_word) const {
    return width % per_word == 0 && is_aligned(x, 16) && is_aligned(y, 16) && is_aligned(out, 16);
  }
};

// Where rows go, which merges may share.
struct Slots {
  const void* positions;
  int index_bytes;
  const void* gate;
  int64_t batch, rows, capacity, width;

  bool is_valid() const {
    return positions && gate && is_index_width(index_bytes) && batch >= 0 && capacity >= 1 && capacity <= rows &&
           width >= 1;
  }
};

constexpr int64_t kWarpsPerCta = kThreads / kWarp;

template <typename T, int kCount>
cudaError_t merge_in_place(const Merge* merges, int count, const Slots& at, cudaStream_t stream) {
  Updated<T, kCount> updated[2] = {};
  for (int i = 0; i < count; ++i) {
    updated[i] = {static_cast<Word<T, kCount>*>(merges[i].out), static_cast<const Word<T, kCount>*>(merges[i].y)};
  }
  const int64_t slots = at.batch * at.capacity;
  return launch(merge_in_place_kernel<T, kCount>, ceil_div(count * slots, kWarpsPerCta), kThreads, stream, updated[0],
                updated[1], count * slots, at.positions, at.index_bytes, static_cast<const T*>(at.gate), slots,
                at.rows, at.capacity, at.width / kCount);
}

template <typename T, int kCount>
cudaError_t merge_streaming(const Merge& merge, const Slots& at, cudaStream_t stream) {
  int processors = 0;
  if (const cudaError_t error = multiprocessors(&processors)) return error;
  // Rows that one wave of CTAs can take are dealt out evenly. For more, many small shares: a last wave that is almost
  // empty is then short.
  const int64_t in_one_wave = ceil_div(at.batch * at.rows, processors * kCtasPerProcessor * kWarpsPerCta);
  const int rows_per_warp = in_one_wave <= 8 ? static_cast<int>(in_one_wave) : 2;
  const int64_t warps_per_batch_row = ceil_div<int64_t>(at.rows, rows_per_warp);
  const int64_t warps = at.batch * warps_per_batch_row;
  return launch(merge_streaming_kernel<T, kCount>, ceil_div(warps, kWarpsPerCta), kThreads, stream,
                static_cast<const Word<T, kCount>*>(merge.x), static_cast<const Word<T, kCount>*>(merge.y),
                at.positions, at.index_bytes, static_cast<const T*>(at.gate),
                static_cast<Word<T, kCount>*>(merge.out), at.rows, at.capacity, at.width / kCount, rows_per_warp,
                warps_per_batch_row, warps);
}

template <typename T, int kCount>
cudaError_t merge_each(const Merge* merges, int count, const Slots& at, cudaStream_t stream) {
  if (std::all_of(merges, merges + count, [](const Merge& merge) { return merge.in_place(); })) {
    return merge_in_place<T, kCount>(merges, count, at, stream);
  }
  for (int i = 0; i < count; ++i) {
    const cudaError_t error = merges[i].in_place() ? merge_in_place<T, kCount>(merges + i, 1, at, stream)
                                                   : merge_streaming<T, kCount>(merges[i], at, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t merge(const Merge* merges, int count, const Slots& at, int dtype, cudaStream_t stream) {
  const bool complete = std::all_of(merges, merges + count, [](const Merge& merge) { return merge.is_complete(); });
  if (!complete || !at.is_valid()) return cudaErrorInvalidValue;
  return with_element(dtype, [&](auto type) -> cudaError_t {
    using T = typename decltype(type)::type;
    constexpr int kWide = kPer16Bytes<T>;
    if (at.batch == 0) return cudaSuccess;
    const bool wide = std::all_of(merges, merges + count,
                                  [&](const Merge& merge) { return merge.is_wide(at.width, kWide); });
    return (wide ? merge_each<T, kWide> : merge_each<T, 1>)(merges, count, at, stream);
  });
}

}  // namespace
}  // namespace modcompile

int modcompile_merge_rows(const void* x, const void* y, const void* positions, int index_bytes, const void* gate,
                          void* out, int dtype, int64_t batch, int64_t rows, int64_t capacity, int64_t width,
                          void* /*workspace*/, cudaStream_t stream) {
  const modcompile::Merge merge = {x, y, out};
  return modcompile::merge(&merge, 1, {positions, index_bytes, gate, batch, rows, capacity, width}, dtype, stream);
}

int modcompile_merge_row_pairs(const void* x, const void* y, const void* other_x, const void* other_y,
                               const void* positions, int index_bytes, const void* gate, void* out, void* other_out,
                               int dtype, int64_t batch, int64_t rows, int64_t capacity, int64_t width,
                               cudaStream_t stream) {
  const modcompile::Merge merges[] = {{x, y, out}, {other_x, other_y, other_out}};
  return modcompile::merge(merges, 2, {positions, index_bytes, gate, batch, rows, capacity, width}, dtype, stream);
}
