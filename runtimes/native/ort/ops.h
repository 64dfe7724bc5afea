// What the ops of the domain `modcompile` are asked for, whatever computes it, and the devices that can be asked.
//
//   B batch   S rows of the routed axis   K capacity   D width
//
// The contract is that of kernels/modcompile_kernels.h and modcompile/ops/*.py. Shapes were checked when these are made.

#ifndef MODCOMPILE_ORT_OPS_H_
#define MODCOMPILE_ORT_OPS_H_

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <array>
#include <cstdint>

namespace modcompile {

struct Route {
  const float* logits;  // [B, S]
  const bool* valid;    // [B, S], or null
  int64_t* positions;   // [B, K]
  bool* filled;         // [B, K]
  int64_t batch, rows, capacity;
};

// A linear router in front of its route.
struct RouteRows {
  const void* x;        // [B, S, D]
  const float* weight;  // [D]
  const float* bias;    // [1]
  float* logits;        // [B, S]
  void* workspace;      // of the device's workspace_bytes
  ONNXTensorElementDataType element;
  int64_t width;
  Route route;  // of these logits
};

struct GatherRows {
  const void* x;             // [B, S, row_bytes]
  const int64_t* positions;  // [B, K]
  void* out;                 // [B, K, row_bytes]
  int64_t batch, rows, capacity, row_bytes;
};

struct MergeRows {
  const void* x;             // [B, S, D]
  const void* y;             // [B, K, D]
  const int64_t* positions;  // [B, K]
  const void* gate;          // [B, K]
  void* out;                 // [B, S, D]; x itself where ONNX Runtime reuses its memory
  ONNXTensorElementDataType element;
  int64_t batch, rows, capacity, width;
};

// A device is made for each call and throws Ort::Exception where an op cannot be done.

class Cpu {
 public:
  static constexpr const char* kProvider = "CPUExecutionProvider";
  static constexpr std::array kMergedTypes = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE};

  explicit Cpu(const Ort::KernelContext&) {}

  static size_t workspace_bytes(int64_t, int64_t) { return 0; }

  void run(const Route& op) const;
  void run(const RouteRows& op) const;
  void run(const GatherRows& op) const;
  void run(const MergeRows& op) const;
};

// Launches on the stream that ONNX Runtime's provider computes on; nothing here waits or allocates.
class Cuda {
 public:
  static constexpr const char* kProvider = "CUDAExecutionProvider";
  static constexpr std::array kMergedTypes = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16};

  explicit Cuda(const Ort::KernelContext& context) : stream_(context.GetGPUComputeStream()) {}

  // Of a RouteRows of batch rows of `rows`.
  static size_t workspace_bytes(int64_t batch, int64_t rows);

  void run(const Route& op) const;
  void run(const RouteRows& op) const;
  void run(const GatherRows& op) const;
  void run(const MergeRows& op) const;

 private:
  void* stream_;
};

}  // namespace modcompile

#endif  // MODCOMPILE_ORT_OPS_H_
