// The ops on CUDA: the kernels, on ONNX Runtime's stream.

#include <cuda_runtime_api.h>

#include <string>

#include "modcompile_kernels.h"
#include "ops.h"

namespace modcompile {
namespace {

constexpr int kInt64 = 8;  // index_bytes

void check(int code, const char* op) {
  if (code != cudaSuccess) {
    ORT_CXX_API_THROW(std::string(op) + ": " + cudaGetErrorString(static_cast<cudaError_t>(code)), ORT_FAIL);
  }
}

int element_of(ONNXTensorElementDataType type) {
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT     ? MODCOMPILE_FLOAT32
         : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? MODCOMPILE_FLOAT16
                                                         : MODCOMPILE_BFLOAT16;
}

}  // namespace

void Cuda::run(const Route& op) const {
  check(modcompile_route(op.logits, reinterpret_cast<const uint8_t*>(op.valid), op.positions, kInt64,
                         reinterpret_cast<uint8_t*>(op.filled), op.batch, op.rows, op.capacity,
                         static_cast<cudaStream_t>(stream_)),
        "Route");
}

size_t Cuda::workspace_bytes(int64_t batch, int64_t rows) { return modcompile_route_rows_workspace(batch, rows); }

void Cuda::run(const RouteRows& op) const {
  const Route& route = op.route;
  const auto stream = static_cast<cudaStream_t>(stream_);
  // ONNX Runtime hands the memory to others between two calls.
  check(cudaMemsetAsync(op.workspace, 0, workspace_bytes(route.batch, route.rows), stream), "RouteRows");
  check(modcompile_route_rows(op.x, element_of(op.element), op.weight, op.bias,
                              reinterpret_cast<const uint8_t*>(route.valid), op.logits, route.positions, kInt64,
                              reinterpret_cast<uint8_t*>(route.filled), route.batch, route.rows, op.width,
                              route.capacity, op.workspace, stream),
        "RouteRows");
}

void Cuda::run(const GatherRows& op) const {
  check(modcompile_gather_rows(op.x, op.positions, kInt64, op.out, op.batch, op.rows, op.capacity, op.row_bytes,
                               static_cast<cudaStream_t>(stream_)),
        "GatherRows");
}

void Cuda::run(const MergeRows& op) const {
  check(modcompile_merge_rows(op.x, op.y, op.positions, kInt64, op.gate, op.out, element_of(op.element), op.batch,
                              op.rows, op.capacity, op.width, nullptr, static_cast<cudaStream_t>(stream_)),
        "MergeRows");
}

}  // namespace modcompile
