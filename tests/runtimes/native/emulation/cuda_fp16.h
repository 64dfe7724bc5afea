// float16 and its conversions, for a compiler without CUDA.

#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  _Float16 native;
  std::memcpy(&native, &value, sizeof native);
  return static_cast<float>(native);
}

inline __half __float2half_rn(float value) {
  const _Float16 native = static_cast<_Float16>(value);
  __half half;
  std::memcpy(&half, &native, sizeof half);
  return half;
}
