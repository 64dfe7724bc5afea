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
#include <map>
#include <mutex>
#include <vector>

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
  ONNXTensorElementDataType element;
  int64_t width;
  Route route;  // of these logits
};

// The sum before a routed block, its norm, and the block's router and route.
struct SumNormRouteRows {
  const void* residual;      // [B, S, D]
  const void* product;       // [B, S, D]
  const void* product_bias;  // [D], or null
  const void* norm_weight;   // [D]
  const void* norm_bias;     // [D], or null
  float epsilon;
  bool centered;  // a layer norm; otherwise an RMS norm
  void* summed;   // [B, S, D]
  void* normed;   // [B, S, D]
  RouteRows route;  // of the sum
};

struct GatherRows {
  const void* x;             // [B, S, row_bytes]
  const int64_t* positions;  // [B, K]
  void* out;                 // [B, K, row_bytes]
  int64_t batch, rows, capacity, row_bytes;
};

// The gathered rows and their norm.
struct GatherNormRows {
  const void* x;             // [B, S, D]
  const int64_t* positions;  // [B, K]
  const void* weight;        // [D]
  const void* bias;          // [D], or null
  float epsilon;
  bool centered;  // a layer norm; otherwise an RMS norm
  void* out;      // [B, K, D]
  void* normed;   // [B, K, D]
  ONNXTensorElementDataType element;
  int64_t batch, rows, capacity, width;
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

// Two merges at the same positions with the same gate.
struct MergeRowPairs {
  MergeRows first;
  const void* other_x;  // [B, S, D]
  const void* other_y;  // [B, K, D]
  void* other_out;      // [B, S, D]; other_x itself where ONNX Runtime reuses its memory
};

// A device is made for each call and throws Ort::Exception where an op cannot be done.

class Cpu {
 public:
  static constexpr const char* kProvider = "CPUExecutionProvider";
  static constexpr std::array kMergedTypes = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE};

  explicit Cpu(const Ort::KernelContext&) {}

  // What a node keeps from one call to the next.
  struct Kept {};

  void run(const Route& op) const;
  void run(const RouteRows& op, Kept&) const;
  void run(const SumNormRouteRows& op, Kept&) const;
  void run(const GatherRows& op) const;
  void run(const GatherNormRows& op) const;
  void run(const MergeRows& op) const;
  void run(const MergeRowPairs& op) const;
};

// Launches on the stream that ONNX Runtime's provider computes on; nothing here waits or allocates.
class Cuda {
 public:
  static constexpr const char* kProvider = "CUDAExecutionProvider";
  static constexpr std::array kMergedTypes = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16};

  explicit Cuda(const Ort::KernelContext& context) : stream_(context.GetGPUComputeStream()) {}

  // A router's workspaces, one a stream: calls on one stream follow each other, those of several threads do not. Kept,
  // since each launch leaves its workspace as zeros: in a CUDA graph, zeroing it costs 5 us a node.
  class Kept {
   public:
    ~Kept();
    // `bytes` of zeros. The first call on a stream allocates, which a capture does not allow; ONNX Runtime runs a model
    // before it captures.
    void* zeros(void* stream, size_t bytes);

   private:
    struct Block {
      void* data;
      size_t bytes;
    };
    std::mutex mutex_;
    std::map<void*, std::vector<Block>> by_stream_;  // what grew stays: a graph may hold the one before
  };

  void run(const Route& op) const;
  void run(const RouteRows& op, Kept& kept) const;
  void run(const SumNormRouteRows& op, Kept& kept) const;
  void run(const GatherRows& op) const;
  void run(const GatherNormRows& op) const;
  void run(const MergeRows& op) const;
  void run(const MergeRowPairs& op) const;

 private:
  void* stream_;
};

}  // namespace modcompile

#endif  // MODCOMPILE_ORT_OPS_H_
