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

Cuda::Kept::~Kept() {
  for (const auto& [stream, blocks] : by_stream_) {
    for (const Block& block : blocks) cudaFree(block.data);
  }
}

void* Cuda::Kept::zeros(void* stream, size_t bytes) {
  const std::lock_guard lock(mutex_);
  std::vector<Block>& blocks = by_stream_[stream];
  if (blocks.empty() || blocks.back().bytes < bytes) {
    void* data = nullptr;
    check(cudaMalloc(&data, bytes), "RouteRows");
    blocks.push_back({data, bytes});
    check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "RouteRows");
  }
  return blocks.back().data;
}

void Cuda::run(const RouteRows& op, Kept& kept) const {
  const Route& route = op.route;
  void* workspace = kept.zeros(stream_, modcompile_route_rows_workspace(route.batch, route.rows));
  check(modcompile_route_rows(op.x, element_of(op.element), op.weight, op.bias,
                              reinterpret_cast<const uint8_t*>(route.valid), op.logits, route.positions, kInt64,
                              reinterpret_cast<uint8_t*>(route.filled), route.batch, route.rows, op.width,
                              route.capacity, workspace, static_cast<cudaStream_t>(stream_)),
        "RouteRows");
}

void Cuda::run(const SumNormRouteRows& op, Kept& kept) const {
  const RouteRows& router = op.route;
  const Route& route = router.route;
  void* workspace = kept.zeros(stream_, modcompile_route_rows_workspace(route.batch, route.rows));
  check(modcompile_sum_norm_route_rows(op.residual, op.product, op.product_bias, element_of(router.element),
                                       op.norm_weight, op.norm_bias, op.epsilon, op.centered, router.weight,
                                       router.bias, reinterpret_cast<const uint8_t*>(route.valid), op.summed, op.normed,
                                       router.logits, route.positions, kInt64,
                                       reinterpret_cast<uint8_t*>(route.filled), route.batch, route.rows, router.width,
                                       route.capacity, workspace, static_cast<cudaStream_t>(stream_)),
        "SumNormRouteRows");
}

void Cuda::run(const GatherRows& op) const {
  check(modcompile_gather_rows(op.x, op.positions, kInt64, op.out, op.batch, op.rows, op.capacity, op.row_bytes,
                               static_cast<cudaStream_t>(stream_)),
        "GatherRows");
}

void Cuda::run(const GatherNormRows& op) const {
  check(modcompile_gather_norm_rows(op.x, element_of(op.element), op.positions, kInt64, op.weight, op.bias, op.epsilon,
                                    op.centered, op.out, op.normed, op.batch, op.rows, op.capacity, op.width,
                                    static_cast<cudaStream_t>(stream_)),
        "GatherNormRows");
}

void Cuda::run(const MergeRows& op) const {
  check(modcompile_merge_rows(op.x, op.y, op.positions, kInt64, op.gate, op.out, element_of(op.element), op.batch,
                              op.rows, op.capacity, op.width, nullptr, static_cast<cudaStream_t>(stream_)),
        "MergeRows");
}

void Cuda::run(const MergeRowPairs& op) const {
  const MergeRows& first = op.first;
  check(modcompile_merge_row_pairs(first.x, first.y, op.other_x, op.other_y, first.positions, kInt64, first.gate,
                                   first.out, op.other_out, element_of(first.element), first.batch, first.rows,
                                   first.capacity, first.width, static_cast<cudaStream_t>(stream_)),
        "MergeRowPairs");
}

}  // namespace modcompile

// Why the kernels do not run on a device, in CUDA's words; null where they do. The calling thread's device stays.
extern "C" __attribute__((visibility("default"))) const char* modcompile_ort_cuda_error(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = static_cast<cudaError_t>(modcompile_kernels_run_here());
    cudaSetDevice(before);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
