// The arithmetic of route's order and of its radix select. Plain C++: the kernels and a test on the CPU share it.

#ifndef MODCOMPILE_RADIX_SELECT_H_
#define MODCOMPILE_RADIX_SELECT_H_

#include <stdint.h>

#ifdef __CUDACC__
#define MODCOMPILE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MODCOMPILE_HOST_DEVICE inline
#endif

namespace modcompile {

// Keys order as logits do, and no logit has one of these two: NaN, which would, counts as -inf.
constexpr uint32_t kAbsent = 0;             // below every row: not in the running
constexpr uint32_t kCertain = 0xffffffffu;  // above every row: chosen whatever the others are

// The bits of a float32 -> a key that is greater for the better logit and equal for equal ones.
MODCOMPILE_HOST_DEVICE uint32_t order_key(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) bits = 0xff800000u;  // NaN counts as -inf
  if (magnitude == 0) bits = 0;                     // -0.0 equals 0.0
  // Positive floats order as their bits do, negative ones the other way round and below.
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What a row's mask makes of its key. Either padding is out of the running, or, where fewer rows than K are valid, every
// valid row is certain and padding competes for the other slots.
MODCOMPILE_HOST_DEVICE uint32_t masked_key(uint32_t key, bool valid, bool padding_enters) {
  if (padding_enters) return valid ? kCertain : key;
  return valid ? key : kAbsent;
}

// A key is read from the top as three digits, of 11, 11 and 10 bits. Eleven, so that the sign, the exponent and two bits
// of the mantissa lie in the first: eight would put most logits of a layer into a handful of bins.
constexpr int kDigits = 3;
constexpr int kBins = 1 << 11;

MODCOMPILE_HOST_DEVICE int digit_shift(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }

// What is known of the K-th best key: its bits under mask. Rows above it are chosen; among those that tie with it under
// the mask, the first `wanted` by position.
struct Threshold {
  uint32_t bits = 0;
  uint32_t mask = 0;
  uint32_t wanted = 0;  // K minus the rows above: at least 1

  MODCOMPILE_HOST_DEVICE bool above(uint32_t key) const { return (key & mask) > bits; }
  MODCOMPILE_HOST_DEVICE bool ties(uint32_t key) const { return (key & mask) == bits; }

  // The bin in which a row that ties is counted for the next digit.
  MODCOMPILE_HOST_DEVICE uint32_t bin(uint32_t key, int digit) const {
    return (key & ~mask) >> digit_shift(digit);
  }

  // The next digit of the K-th best key is `bin`, which holds the `wanted_there`-th of its rows.
  MODCOMPILE_HOST_DEVICE void descend(int digit, uint32_t bin, uint32_t wanted_there) {
    bits |= bin << digit_shift(digit);
    mask = 0xffffffffu << digit_shift(digit);
    wanted = wanted_there;
  }
};

}  // namespace modcompile

#endif  // MODCOMPILE_RADIX_SELECT_H_
