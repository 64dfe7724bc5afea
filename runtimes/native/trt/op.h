// Our ops as TensorRT plugins know them, whatever the interface: their tensors, shapes and launches.
//
//   B batch   S rows of the routed axis   K capacity   D width
//
//   Route            logits [B, S] float32                                   -> positions [B, K]
//   MaskedRoute      logits [B, S] float32, valid [B, S] int32               -> positions [B, K]
//   RouteRows        x [B, S, D], weight [D] float32, bias [1] float32       -> logits [B, S] float32, positions [B, K]
//   MaskedRouteRows  x, weight, bias, valid [B, S] int32                     -> logits, positions
//   GatherRows       x [B, S, ...], positions [B, K]                         -> rows [B, K, ...]
//   MergeRows        x [B, S, D], y [B, K, D], positions, gate [B, K]        -> merged [B, S, D]
//
// The routes of rows have the router in front: logits = x . weight + bias. Standard layers would write x out in float32.
// TensorRT's plugins take and give no bool, so `valid` is nonzero at valid rows, and `filled` is left to the graph: it is
// valid at positions. K is a build-time constant, the field "capacity" of the routes. Positions are int64, but int32
// before TensorRT 10, which has no other. runtimes/trt/plugins.py makes such nodes of ours.

#ifndef MODCOMPILE_TRT_OP_H_
#define MODCOMPILE_TRT_OP_H_

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>

namespace modcompile {

constexpr const char* kNamespace = "modcompile";
// Of the plugins: of what they take, give and serialize.
#define MODCOMPILE_PLUGIN_VERSION "1"
constexpr const char* kVersion = MODCOMPILE_PLUGIN_VERSION;
constexpr const char* kCapacityField = "capacity";

enum class Kind { kRoute, kMaskedRoute, kRouteRows, kMaskedRouteRows, kGatherRows, kMergeRows };
constexpr Kind kKinds[] = {Kind::kRoute,           Kind::kMaskedRoute, Kind::kRouteRows,
                           Kind::kMaskedRouteRows, Kind::kGatherRows,  Kind::kMergeRows};

// An op of one node.
class Op {
 public:
  // `capacity` is that of a route, and 0 for the others.
  Op(Kind kind, int32_t capacity) : kind_(kind), capacity_(capacity) {}

  Kind kind() const { return kind_; }
  int32_t capacity() const { return capacity_; }

  int32_t input_count() const;
  int32_t output_count() const;

  // Whether the tensor at `index`, inputs first and then outputs, may have this type where the first has type `first`.
  bool takes(int32_t index, nvinfer1::DataType type, nvinfer1::DataType first) const;

  nvinfer1::DataType output_type(int32_t output, nvinfer1::DataType first) const;
  nvinfer1::DimsExprs output_dims(int32_t output, const nvinfer1::DimsExprs* inputs,
                                  nvinfer1::IExprBuilder& builder) const;

  // Bytes of device memory for inputs of at most these sizes, the first one's.
  size_t workspace(const nvinfer1::Dims& first) const;

  // Launches on the stream; 0, or what went wrong, which is logged.
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const void* const* tensors, void* const* outputs,
                  void* workspace, cudaStream_t stream) const;

 private:
  int route(const nvinfer1::PluginTensorDesc* inputs, const void* const* tensors, void* const* outputs, void* workspace,
            cudaStream_t stream) const;

  Kind kind_;
  int32_t capacity_;
};

const char* name_of(Kind kind);
constexpr bool has_router(Kind kind) { return kind == Kind::kRouteRows || kind == Kind::kMaskedRouteRows; }
constexpr bool is_masked(Kind kind) { return kind == Kind::kMaskedRoute || kind == Kind::kMaskedRouteRows; }
constexpr bool has_capacity(Kind kind) { return kind == Kind::kRoute || is_masked(kind) || has_router(kind); }

// Makes the op of a node from its plugin's fields. False, which is logged, for fields that are not an op's.
bool read_fields(Kind kind, const nvinfer1::PluginFieldCollection& fields, int32_t* capacity);

void log_error(Kind kind, const char* problem);

}  // namespace modcompile

#endif  // MODCOMPILE_TRT_OP_H_
