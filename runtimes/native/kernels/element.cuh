// float32, float16 and bfloat16 as elements of 16-byte words.

#ifndef MODCOMPILE_ELEMENT_CUH_
#define MODCOMPILE_ELEMENT_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#include "launch.cuh"
#include "modcompile_kernels.h"

namespace modcompile {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);  // rounds to nearest, ties to even
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
constexpr int kPer16Bytes = 16 / static_cast<int>(sizeof(T));

// kCount elements, as they are computed with.
template <typename T, int kCount>
struct Elements {
  T at[kCount];
};

// The same as they are loaded, stored and held: packed. Held as elements, each of two bytes would take a register.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <typename T, int kCount>
using Word = typename WordOf<static_cast<int>(sizeof(T)) * kCount>::type;

template <typename T, int kCount>
__device__ __forceinline__ Elements<T, kCount> unpack(Word<T, kCount> word) {
  Elements<T, kCount> elements;
  memcpy(&elements, &word, sizeof word);
  return elements;
}

template <typename T, int kCount>
__device__ __forceinline__ Word<T, kCount> pack(const Elements<T, kCount>& elements) {
  Word<T, kCount> word;
  memcpy(&word, &elements, sizeof word);
  return word;
}

template <typename T>
struct Type {
  using type = T;
};

// Calls visit(Type<T>()) with the T of a dtype of the C API.
template <typename Visit>
cudaError_t with_element(int dtype, Visit visit) {
  switch (dtype) {
    case MODCOMPILE_FLOAT32:
      return visit(Type<float>());
    case MODCOMPILE_FLOAT16:
      return visit(Type<__half>());
    case MODCOMPILE_BFLOAT16:
      return visit(Type<__nv_bfloat16>());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace modcompile

#endif  // MODCOMPILE_ELEMENT_CUH_
