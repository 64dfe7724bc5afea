// The CUDA kernels of modcompile, as a C API: what an ONNX Runtime custom op, a TensorRT plugin or a test calls.
//
//   B batch   S rows of the routed axis   K capacity   D width, the model dim
//
// The three operations and their contract:
//   route        which K of the S rows enter a block. Order: valid rows before invalid ones, then the higher logit (NaN
//                counts as -inf, -0.0 equals 0.0), then the lower position. The K best are given in ascending position.
//   gather_rows  the chosen rows, packed.
//   merge_rows   x, with the chosen rows replaced by x + gate * (y - x).
// The references are modcompile/ops/*.py, and these kernels agree with them bit for bit (the payload of a NaN that a
// merge computes is the hardware's).
//
// Four more do two of them, or one and what stands beside it, in one launch: modcompile_route_rows,
// modcompile_sum_norm_route_rows, modcompile_gather_norm_rows and modcompile_merge_row_pairs.
//
// Every function only launches: no allocation, no synchronisation, static grid. All can be captured into a CUDA graph.
// Pointers are device pointers on the current device, aligned to their element (a row of bytes may begin anywhere);
// tensors are dense and row-major; outputs overlap no input unless said otherwise.
//
// Every function returns a cudaError_t: cudaErrorInvalidValue, with nothing launched, for arguments that cannot be (a
// null pointer, a size below 1, K > S, an unknown dtype or index width), otherwise what the launch returned. A batch of
// 0 is a success that launches nothing.

#ifndef MODCOMPILE_KERNELS_H_
#define MODCOMPILE_KERNELS_H_

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#define MODCOMPILE_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum {
  MODCOMPILE_FLOAT32 = 0,
  MODCOMPILE_FLOAT16 = 1,
  MODCOMPILE_BFLOAT16 = 2,
};

// The version of this library, "MAJOR.MINOR.PATCH"; modcompile's own. Never null.
MODCOMPILE_API const char* modcompile_kernels_version(void);

// Whether the current device can run these kernels: cudaErrorNoKernelImageForDevice for a GPU of another architecture
// than they were compiled for.
MODCOMPILE_API int modcompile_kernels_run_here(void);

// Chooses the K best rows of each batch row. One launch, one CTA for each batch row.
//
//   logits       [B, S] float32
//   valid        [B, S] bool, false at padding; null when every row is valid
//   positions    [B, K] out, int64 (index_bytes 8) or int32 (index_bytes 4), ascending and unique in a row
//   filled       [B, K] bool out, false where the slot holds an invalid row
//   batch, rows, capacity   B, S and K: 1 <= K <= S <= 2^30, B < 2^31
MODCOMPILE_API int modcompile_route(const float* logits, const uint8_t* valid, void* positions, int index_bytes,
                                    uint8_t* filled, int64_t batch, int64_t rows, int64_t capacity,
                                    cudaStream_t stream);

// The bytes of device memory that modcompile_route_rows needs, 4-byte aligned. 0 if the arguments cannot be.
//
// Zero it once, when it is allocated: every launch that completes leaves it zero again. Launches that may run at the
// same time must not share one.
MODCOMPILE_API size_t modcompile_route_rows_workspace(int64_t batch, int64_t rows);

// A linear router and its route in one launch: logits = x . weight + bias, then as modcompile_route.
//
// Products and sums are float32, in an order that depends on the shape alone: the same input gives the same bits.
//
//   x            [B, S, D] of dtype
//   weight       [D] float32
//   bias         [1] float32
//   valid        [B, S] bool or null, as for modcompile_route
//   logits       [B, S] float32 out
//   positions, index_bytes, filled, batch, rows, capacity   as for modcompile_route
//   width        D >= 1
//   workspace    see modcompile_route_rows_workspace
MODCOMPILE_API int modcompile_route_rows(const void* x, int dtype, const float* weight, const float* bias,
                                         const uint8_t* valid, float* logits, void* positions, int index_bytes,
                                         uint8_t* filled, int64_t batch, int64_t rows, int64_t width, int64_t capacity,
                                         void* workspace, cudaStream_t stream);

// What stands between a dense block and a routed one, in one launch: the residual stream's next value, its norm for the
// block after the routed one, and the routed one's router and route.
//
//   summed = residual + product + product_bias, in float32, rounded once
//   normed = its layer norm or RMS norm, as for modcompile_gather_norm_rows
//   logits = summed . weight + bias, and so on as for modcompile_route_rows
//
//   residual, product            [B, S, D] of dtype
//   product_bias                 [D] of dtype, or null
//   norm_weight, norm_bias       [D] of dtype; the bias may be null
//   summed, normed               [B, S, D] of dtype, out
//   everything else              as for the other two; the workspace is that of modcompile_route_rows
MODCOMPILE_API int modcompile_sum_norm_route_rows(const void* residual, const void* product, const void* product_bias,
                                                  int dtype, const void* norm_weight, const void* norm_bias,
                                                  float epsilon, int centered, const float* weight, const float* bias,
                                                  const uint8_t* valid, void* summed, void* normed, float* logits,
                                                  void* positions, int index_bytes, uint8_t* filled, int64_t batch,
                                                  int64_t rows, int64_t width, int64_t capacity, void* workspace,
                                                  cudaStream_t stream);

// Packs the rows of x at positions. Rows are bytes, so any dtype and any trailing dims will do.
//
//   x            [B, S, row_bytes] bytes, of any alignment
//   positions    [B, K], int64 (index_bytes 8) or int32 (index_bytes 4), in 0..S-1, in any order. No memory outside of
//                x is read for one that is not (TensorRT may time a plugin on buffers of arbitrary content): such a row
//                comes out as zero bytes.
//   out          [B, K, row_bytes] bytes out, of any alignment
MODCOMPILE_API int modcompile_gather_rows(const void* x, const void* positions, int index_bytes, void* out,
                                          int64_t batch, int64_t rows, int64_t capacity, int64_t row_bytes,
                                          cudaStream_t stream);

// Packs the rows of x at positions, and beside them what a layer norm or an RMS norm makes of each: in float32, rounded
// once.
//
//   x            [B, S, D] of dtype
//   positions    [B, K], as for modcompile_gather_rows; a row for one that is not in 0..S-1 is zeros, and so its norm
//   weight       [D] of dtype
//   bias         [D] of dtype, or null
//   epsilon      is added to the variance, or to the mean square
//   centered     1: (x - mean) / sqrt(variance + epsilon) * weight + bias, a layer norm; 0: without the mean, an RMS norm
//   out, normed  [B, K, D] of dtype, out
MODCOMPILE_API int modcompile_gather_norm_rows(const void* x, int dtype, const void* positions, int index_bytes,
                                               const void* weight, const void* bias, float epsilon, int centered,
                                               void* out, void* normed, int64_t batch, int64_t rows, int64_t capacity,
                                               int64_t width, cudaStream_t stream);

// Writes x + gate * (y - x) at positions, and every other row of x as it is, bit for bit.
//
// A gate of 1 gives y bit for bit; a gate of 0 gives x bit for bit, even where y is NaN or infinite. Between the two
// the difference, the product and the sum are each rounded to dtype, as the reference rounds them.
//
//   x            [B, S, D] of dtype
//   y            [B, K, D] of dtype
//   positions    [B, K], int64 (index_bytes 8) or int32 (index_bytes 4), in 0..S-1, ascending and unique in a row, as a
//                route gives them. Nothing outside the tensors is touched for positions that are not.
//   gate         [B, K] of dtype; 0 for a slot that is not filled
//   out          [B, S, D] of dtype, out. Another tensor: one streaming pass writes every row once. x itself: in place,
//                and only the K rows whose gate is not 0 are touched.
//   workspace    null: none is needed
MODCOMPILE_API int modcompile_merge_rows(const void* x, const void* y, const void* positions, int index_bytes,
                                         const void* gate, void* out, int dtype, int64_t batch, int64_t rows,
                                         int64_t capacity, int64_t width, void* workspace, cudaStream_t stream);

// Two merges at the same positions with the same gate, such as of the residual stream and of its norm: one launch where
// both are in place.
//
//   x, y, out                     of one merge, as for modcompile_merge_rows
//   other_x, other_y, other_out   of the other, of the same shapes; they overlap nothing of the first
MODCOMPILE_API int modcompile_merge_row_pairs(const void* x, const void* y, const void* other_x, const void* other_y,
                                              const void* positions, int index_bytes, const void* gate, void* out,
                                              void* other_out, int dtype, int64_t batch, int64_t rows,
                                              int64_t capacity, int64_t width, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif  // MODCOMPILE_KERNELS_H_
