#ifndef MODCOMPILE_TRT_NARROW_MASK_H_
#define MODCOMPILE_TRT_NARROW_MASK_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace modcompile {

// mask, any nonzero being true -> bool, as the kernels take it. One launch.
cudaError_t narrow_mask(const int32_t* mask, uint8_t* narrow, int64_t count, cudaStream_t stream);

}  // namespace modcompile

#endif  // MODCOMPILE_TRT_NARROW_MASK_H_
