// gather_rows: the chosen rows, packed. The floor is reading and writing them once.

#include "launch.cuh"
#include "modcompile_kernels.h"

namespace modcompile {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // words that a thread loads before it stores the first

// A row of the CTA's `threads_per_row` consecutive threads; rows are `words` of type Word.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const Word* __restrict__ x, const void* __restrict__ positions, int index_bytes,
                       Word* __restrict__ out, int64_t slots, int64_t rows, int64_t capacity, int64_t words,
                       int threads_per_row) {
  const int rows_per_cta = kThreads / threads_per_row;
  const int thread = static_cast<int>(threadIdx.x) % threads_per_row;
  const int64_t slot = blockIdx.x * static_cast<int64_t>(rows_per_cta) + static_cast<int>(threadIdx.x) / threads_per_row;
  if (slot >= slots) return;
  const int64_t position = load_index(positions, slot, index_bytes);
  const bool exists = 0 <= position && position < rows;
  const Word* from = x + (slot / capacity * rows + (exists ? position : 0)) * words;
  Word* to = out + slot * words;
  for (int64_t first = thread; first < words; first += static_cast<int64_t>(kInFlight) * threads_per_row) {
    Word held[kInFlight] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t word = first + static_cast<int64_t>(i) * threads_per_row;
      if (exists && word < words) held[i] = from[word];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t word = first + static_cast<int64_t>(i) * threads_per_row;
      if (word < words) to[word] = held[i];
    }
  }
}

template <typename Word>
bool fits(const void* x, const void* out, int64_t row_bytes) {
  constexpr int64_t kBytes = sizeof(Word);
  return row_bytes % kBytes == 0 && is_aligned(x, kBytes) && is_aligned(out, kBytes);
}

template <typename Word>
cudaError_t gather(const void* x, const void* positions, int index_bytes, void* out, int64_t batch, int64_t rows,
                   int64_t capacity, int64_t row_bytes, cudaStream_t stream) {
  const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
  int threads_per_row = 1;
  while (threads_per_row < kThreads && threads_per_row * kInFlight < words) threads_per_row *= 2;
  const int64_t slots = batch * capacity;
  const int64_t blocks = ceil_div<int64_t>(slots, kThreads / threads_per_row);
  return launch(gather_rows_kernel<Word>, blocks, kThreads, stream, static_cast<const Word*>(x), positions, index_bytes,
                static_cast<Word*>(out), slots, rows, capacity, words, threads_per_row);
}

}  // namespace
}  // namespace modcompile

int modcompile_gather_rows(const void* x, const void* positions, int index_bytes, void* out, int64_t batch,
                           int64_t rows, int64_t capacity, int64_t row_bytes, cudaStream_t stream) {
  using namespace modcompile;
  if (!x || !positions || !out || !is_index_width(index_bytes) || batch < 0 || capacity < 1 || capacity > rows ||
      row_bytes < 1) {
    return cudaErrorInvalidValue;
  }
  if (batch == 0) return cudaSuccess;
  const auto gather_as = fits<uint4>(x, out, row_bytes)      ? gather<uint4>
                         : fits<uint2>(x, out, row_bytes)    ? gather<uint2>
                         : fits<uint32_t>(x, out, row_bytes) ? gather<uint32_t>
                         : fits<uint16_t>(x, out, row_bytes) ? gather<uint16_t>
                                                             : gather<uint8_t>;
  return gather_as(x, positions, index_bytes, out, batch, rows, capacity, row_bytes, stream);
}
