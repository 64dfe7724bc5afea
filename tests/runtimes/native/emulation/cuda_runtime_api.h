// What modcompile_kernels.h takes from CUDA, for a compiler without it.

#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
