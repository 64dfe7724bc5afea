// route for one batch row, by one CTA: a radix select finds the K-th best key, ballots write positions in their order.
//
// Latency decides here (a row of 8192 logits is 32 KB), so every key is read once and kept in a register where a row
// fits, a digit takes three barriers, and the select stops at the first digit that settles it: for logits without ties
// mostly the second of three. There is no sort: a warp owns consecutive rows, and lanes of a ballot are consecutive too.

#ifndef MODCOMPILE_SELECT_ROWS_CUH_
#define MODCOMPILE_SELECT_ROWS_CUH_

#include "launch.cuh"
#include "radix_select.h"

namespace modcompile {

constexpr int64_t kMostRows = 1 << 30;  // a position past S, in a CTA's last items, is still an int

// One batch row's inputs and outputs.
struct RouteRow {
  const float* logits;   // [S]
  const uint8_t* valid;  // [S] or null
  void* positions;       // [K] of index_bytes
  int index_bytes;
  uint8_t* filled;  // [K]
  int rows;         // S
  int capacity;     // K
};

// A row of the batch for a CTA of kThreads threads. With kHeld, S <= kThreads * kItems and a thread keeps its kItems
// keys; otherwise any S, and keys are read again, kItems at a time, whenever they are looked at.
template <int kThreads, int kItems, bool kHeld>
class RowSelect {
 public:
  // The bin that holds the wanted-th row of a digit.
  struct Found {
    uint32_t bin, wanted, count;
  };
  struct Shared {
    uint32_t histogram[kDigits * kBins];
    uint32_t per_warp[2][kThreads / kWarp];
    Found found[kDigits];  // one a digit: none is written where another may still be read
  };

  __device__ RowSelect(const RouteRow& row, Shared& shared)
      : row_(row),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        warp_(static_cast<int>(threadIdx.x) / kWarp),
        groups_(kHeld ? 1 : ceil_div(row.rows, kThreads * kItems)),
        first_(warp_ * groups_ * kItems * kWarp) {}

  __device__ void run() {
    if constexpr (kHeld) load_logits(0);
#pragma unroll
    for (int i = 0; i < kDigits * kBins; i += kThreads) shared_.histogram[i + static_cast<int>(threadIdx.x)] = 0;
    count_valid();
    __syncthreads();  // the loads need not be back yet
    padding_enters_ = row_.valid != nullptr && sum_per_warp(1, 0, kWarps) < static_cast<uint32_t>(row_.capacity);
    if constexpr (kHeld) make_keys(0);
    write(find_threshold());
  }

 private:
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kBinsPerLane = kBins / kThreads;
  static_assert(kWarps <= kWarp && kBins % kThreads == 0);

  // Item i of group g is, over the lanes of a warp, 32 consecutive rows.
  __device__ int position(int group, int i) const { return first_ + (group * kItems + i) * kWarp + lane_; }

  __device__ bool is_valid(int position) const { return row_.valid[position] != 0; }

  // Without a condition, so that the loads are issued together and wait once: a position past S reads the last logit.
  // ld.cg, for in the fused kernel other CTAs wrote the logits, and what L1 holds of them may be old.
  __device__ void load_logits(int group) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      keys_[i] = __float_as_uint(__ldcg(row_.logits + min(position(group, i), row_.rows - 1)));
    }
  }

  __device__ void make_keys(int group) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = position(group, i);
      uint32_t key = order_key(keys_[i]);
      if (row_.valid != nullptr) key = masked_key(key, is_valid(min(at, row_.rows - 1)), padding_enters_);
      keys_[i] = at < row_.rows ? key : kAbsent;
    }
  }

  // Calls visit(position, key) for every row of this thread, and for positions past S with kAbsent; all lanes together.
  template <typename Visit>
  __device__ void each_row(Visit visit) {
    for (int group = 0; group < groups_; ++group) {
      if constexpr (!kHeld) {
        load_logits(group);
        make_keys(group);
      }
#pragma unroll
      for (int i = 0; i < kItems; ++i) visit(position(group, i), keys_[i]);
    }
  }

  // Each warp's number of valid rows: together they decide what the mask makes of a key.
  __device__ void count_valid() {
    if (row_.valid == nullptr) return;
    uint32_t count = 0;
    for (int i = 0; i < groups_ * kItems; ++i) {
      const int at = position(0, i);
      count += at < row_.rows && is_valid(at);
    }
    count = __reduce_add_sync(kAllLanes, count);
    if (lane_ == 0) shared_.per_warp[1][warp_] = count;
  }

  __device__ Threshold find_threshold() {
    Threshold threshold;
    threshold.wanted = static_cast<uint32_t>(row_.capacity);
#pragma unroll 1
    for (int digit = 0; digit < kDigits; ++digit) {
      uint32_t* histogram = shared_.histogram + digit * kBins;
      each_row([&](int, uint32_t key) {
        count(histogram, key != kAbsent && threshold.ties(key), threshold.bin(key, digit));
      });
      __syncthreads();
      const Found found = find_bin(histogram, threshold.wanted, shared_.found[digit]);
      threshold.descend(digit, found.bin, found.wanted);
      if (found.wanted == found.count) break;  // the whole bin is chosen: lower digits change nothing
    }
    return threshold;
  }

  // Adds 1 to the bin of every lane that counts. A warp that agrees on its bin adds once: a new router's logits are all
  // equal, and 32 lanes on one address would take turns.
  __device__ void count(uint32_t* histogram, bool counts, uint32_t bin) {
    const uint32_t first_bin = __shfl_sync(kAllLanes, bin, 0);
    if (__all_sync(kAllLanes, counts && bin == first_bin)) {
      if (lane_ == 0) atomicAdd(&histogram[bin], static_cast<uint32_t>(kWarp));
    } else if (counts) {
      atomicAdd(&histogram[bin], 1u);
    }
  }

  // Finds the bin that holds the wanted-th row, counted from the highest bin. Three sums from the top: over warps, over
  // the lanes of the one warp that owns it, over that lane's bins.
  __device__ Found find_bin(const uint32_t* histogram, uint32_t wanted, Found& found) {
    uint32_t bins[kBinsPerLane];
    uint32_t in_lane = 0;
    const int first = static_cast<int>(threadIdx.x) * kBinsPerLane;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) in_lane += bins[i] = histogram[first + i];
    const uint32_t in_warp = __reduce_add_sync(kAllLanes, in_lane);
    if (lane_ == 0) shared_.per_warp[0][warp_] = in_warp;
    __syncthreads();
    const uint32_t above_warp = sum_per_warp(0, warp_ + 1, kWarps);
    if (above_warp < wanted && wanted <= above_warp + in_warp) {
      uint32_t from_lane = in_lane;  // the rows of this lane and the ones above it
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const uint32_t higher = __shfl_down_sync(kAllLanes, from_lane, static_cast<unsigned>(offset));
        if (lane_ + offset < kWarp) from_lane += higher;
      }
      uint32_t above = above_warp + from_lane - in_lane;
#pragma unroll
      for (int i = kBinsPerLane - 1; i >= 0; --i) {
        if (above < wanted && wanted <= above + bins[i]) {
          found = {static_cast<uint32_t>(first + i), wanted - above, bins[i]};
        }
        above += bins[i];
      }
    }
    __syncthreads();
    return found;
  }

  // Of the numbers that the warps first..last-1 left in slot `which`.
  __device__ uint32_t sum_per_warp(int which, int first, int last) const {
    return __reduce_add_sync(kAllLanes, first <= lane_ && lane_ < last ? shared_.per_warp[which][lane_] : 0);
  }

  // A row's slot is the number of chosen rows before it: those above the threshold, and of those that tie the first
  // `wanted`.
  __device__ void write(const Threshold& threshold) {
    uint32_t above = 0, ties = 0;
    each_row([&](int, uint32_t key) {
      above += threshold.above(key);
      ties += threshold.ties(key);
    });
    above = __reduce_add_sync(kAllLanes, above);
    ties = __reduce_add_sync(kAllLanes, ties);
    if (lane_ == 0) {
      shared_.per_warp[0][warp_] = above;
      shared_.per_warp[1][warp_] = ties;
    }
    __syncthreads();
    above = sum_per_warp(0, 0, warp_);
    ties = sum_per_warp(1, 0, warp_);
    const unsigned lower_lanes = (1u << lane_) - 1;
    each_row([&](int at, uint32_t key) {
      const unsigned above_lanes = __ballot_sync(kAllLanes, threshold.above(key));
      const unsigned ties_lanes = __ballot_sync(kAllLanes, threshold.ties(key));
      const uint32_t ties_before = ties + static_cast<uint32_t>(__popc(ties_lanes & lower_lanes));
      if (threshold.above(key) || (threshold.ties(key) && ties_before < threshold.wanted)) {
        const uint32_t above_before = above + static_cast<uint32_t>(__popc(above_lanes & lower_lanes));
        const uint32_t slot = above_before + min(ties_before, threshold.wanted);
        store_index(row_.positions, slot, row_.index_bytes, at);
        row_.filled[slot] = !padding_enters_ || key == kCertain;
      }
      above += static_cast<uint32_t>(__popc(above_lanes));
      ties += static_cast<uint32_t>(__popc(ties_lanes));
    });
  }

  const RouteRow row_;
  Shared& shared_;
  const int lane_, warp_;
  const int groups_;  // of kItems rows a lane
  const int first_;   // of this warp's rows
  bool padding_enters_ = false;
  uint32_t keys_[kItems];  // or, between load_logits and make_keys, the bits of the logits
};

}  // namespace modcompile

#endif  // MODCOMPILE_SELECT_ROWS_CUH_
