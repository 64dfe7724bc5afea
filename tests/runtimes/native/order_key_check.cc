// Goes through every float32 there is: keys must order as the contract orders logits. Prints the first that does not.

#include "radix_select.h"

#include <cstdio>
#include <initializer_list>

int main() {
  using namespace modcompile;
  // From the least to the greatest: -inf, the negative floats by falling bits, 0, the positive ones by rising bits.
  uint32_t last = kAbsent;
  const auto comes_next = [&last](uint32_t bits) {
    const uint32_t key = order_key(bits);
    const bool ascends = key > last;
    last = key;
    return ascends;
  };
  for (uint32_t bits = 0xff800000u; bits > 0x80000000u; --bits) {
    if (!comes_next(bits)) return std::printf("%08x does not come after %08x\n", bits, bits + 1), 1;
  }
  for (uint32_t bits = 0; bits <= 0x7f800000u; ++bits) {
    if (!comes_next(bits)) return std::printf("%08x does not come after the one before\n", bits), 1;
  }
  if (last >= kCertain) return std::printf("+inf is as great as kCertain\n"), 1;
  if (order_key(0x80000000u) != order_key(0)) return std::printf("-0.0 is not 0.0\n"), 1;
  for (uint32_t mantissa = 1; mantissa < 1u << 23; ++mantissa) {
    for (const uint32_t sign : {0u, 0x80000000u}) {
      const uint32_t nan = sign | 0x7f800000u | mantissa;
      if (order_key(nan) != order_key(0xff800000u)) return std::printf("NaN %08x is not -inf\n", nan), 1;
    }
  }
  // The digits of a key are a partition of its bits.
  for (uint32_t key : {0x007fffffu, 0x80000000u, 0xdeadbeefu, 0xff800000u, kCertain}) {
    Threshold threshold;
    for (int digit = 0; digit < kDigits; ++digit) {
      const uint32_t bin = threshold.bin(key, digit);
      if (bin >= kBins) return std::printf("digit %d of %08x has no bin\n", digit, key), 1;
      threshold.descend(digit, bin, 1);
      if (!threshold.ties(key) || threshold.above(key)) return std::printf("%08x left its own prefix\n", key), 1;
    }
    if (threshold.bits != key) return std::printf("the digits of %08x make %08x\n", key, threshold.bits), 1;
  }
  return 0;
}
