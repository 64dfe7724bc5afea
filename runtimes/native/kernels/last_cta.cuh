// CTAs that share a batch row, and the one of them that finishes last: what needs the whole row costs no launch.

#ifndef MODCOMPILE_LAST_CTA_CUH_
#define MODCOMPILE_LAST_CTA_CUH_

#include <cuda_runtime.h>
#include <stdint.h>

namespace modcompile {

// Whether this CTA is the last of its batch row. What the others wrote before they asked is then visible to it.
__device__ inline bool is_last(uint32_t* finished, uint32_t ctas) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(finished, 1u) == ctas - 1;
    if (last) *finished = 0;  // for the next launch
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace modcompile

#endif  // MODCOMPILE_LAST_CTA_CUH_
