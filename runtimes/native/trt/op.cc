#include "op.h"

#include <cstring>
#include <string>

#include "modcompile_kernels.h"
#include "narrow_mask.h"

namespace modcompile {
namespace {

using nvinfer1::DataType;

#if NV_TENSORRT_MAJOR >= 10
constexpr DataType kPositions = DataType::kINT64;
constexpr int kIndexBytes = 8;
#else
constexpr DataType kPositions = DataType::kINT32;
constexpr int kIndexBytes = 4;
#endif

bool is_merged(DataType type) {
#if NV_TENSORRT_MAJOR >= 10
  if (type == DataType::kBF16) return true;
#endif
  return type == DataType::kFLOAT || type == DataType::kHALF;
}

bool is_gathered(DataType type) { return is_merged(type) || type == DataType::kINT32 || type == kPositions; }

int element_of(DataType type) {
  return type == DataType::kFLOAT ? MODCOMPILE_FLOAT32 : type == DataType::kHALF ? MODCOMPILE_FLOAT16
                                                                                : MODCOMPILE_BFLOAT16;
}

int64_t bytes_of(DataType type) {
  if (type == DataType::kFLOAT || type == DataType::kINT32) return 4;
  return type == kPositions ? 8 : 2;
}

// What a tensor of an op is, which decides its types.
enum class Role { kReal, kMask, kPosition, kElement };

constexpr int32_t kMostTensors = 6;
struct Tensors {
  int32_t inputs;
  int32_t outputs;
  Role roles[kMostTensors];  // of the inputs, then of the outputs
};

constexpr Tensors tensors_of(Kind kind) {
  switch (kind) {
    case Kind::kRoute:
      return {1, 1, {Role::kReal, Role::kPosition}};
    case Kind::kMaskedRoute:
      return {2, 1, {Role::kReal, Role::kMask, Role::kPosition}};
    case Kind::kRouteRows:
      return {3, 2, {Role::kElement, Role::kReal, Role::kReal, Role::kReal, Role::kPosition}};
    case Kind::kMaskedRouteRows:
      return {4, 2, {Role::kElement, Role::kReal, Role::kReal, Role::kMask, Role::kReal, Role::kPosition}};
    case Kind::kGatherRows:
      return {2, 1, {Role::kElement, Role::kPosition, Role::kElement}};
    case Kind::kMergeRows:
      return {4, 1, {Role::kElement, Role::kElement, Role::kPosition, Role::kElement, Role::kElement}};
  }
  return {};
}

}  // namespace

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kRoute:
      return "Route";
    case Kind::kMaskedRoute:
      return "MaskedRoute";
    case Kind::kRouteRows:
      return "RouteRows";
    case Kind::kMaskedRouteRows:
      return "MaskedRouteRows";
    case Kind::kGatherRows:
      return "GatherRows";
    case Kind::kMergeRows:
      return "MergeRows";
  }
  return nullptr;
}

void log_error(Kind kind, const char* problem) {
  if (nvinfer1::ILogger* logger = getLogger()) {
    const std::string text = std::string("modcompile ") + name_of(kind) + ": " + problem;
    logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
  }
}

bool read_fields(Kind kind, const nvinfer1::PluginFieldCollection& fields, int32_t* capacity) {
  *capacity = 0;
  if (!has_capacity(kind)) return true;
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const nvinfer1::PluginField& field = fields.fields[i];
    if (std::strcmp(field.name, kCapacityField) != 0 || field.data == nullptr || field.length != 1) continue;
    if (field.type == nvinfer1::PluginFieldType::kINT32) *capacity = *static_cast<const int32_t*>(field.data);
#if NV_TENSORRT_MAJOR >= 10
    if (field.type == nvinfer1::PluginFieldType::kINT64) {
      *capacity = static_cast<int32_t>(*static_cast<const int64_t*>(field.data));
    }
#endif
  }
  if (*capacity < 1) log_error(kind, "expected the field \"capacity\", an integer of at least 1");
  return *capacity >= 1;
}

int32_t Op::input_count() const { return tensors_of(kind_).inputs; }

int32_t Op::output_count() const { return tensors_of(kind_).outputs; }

bool Op::takes(int32_t index, DataType type, DataType first) const {
  const Tensors tensors = tensors_of(kind_);
  if (index < 0 || index >= tensors.inputs + tensors.outputs) return false;
  switch (tensors.roles[index]) {
    case Role::kReal:
      return type == DataType::kFLOAT;
    case Role::kMask:
      return type == DataType::kINT32;
    case Role::kPosition:
      return type == kPositions;
    case Role::kElement:
      return type == first && (kind_ == Kind::kGatherRows ? is_gathered(type) : is_merged(type));
  }
  return false;
}

DataType Op::output_type(int32_t output, DataType first) const {
  const Tensors tensors = tensors_of(kind_);
  switch (tensors.roles[tensors.inputs + output]) {
    case Role::kPosition:
      return kPositions;
    case Role::kReal:
      return DataType::kFLOAT;
    default:
      return first;
  }
}

nvinfer1::DimsExprs Op::output_dims(int32_t output, const nvinfer1::DimsExprs* inputs,
                                    nvinfer1::IExprBuilder& builder) const {
  nvinfer1::DimsExprs dims = inputs[0];
  if (has_capacity(kind_)) {
    dims.nbDims = 2;
    // The last one are positions.
    if (output == output_count() - 1) dims.d[1] = builder.constant(capacity_);
  }
  if (kind_ == Kind::kGatherRows) dims.d[1] = inputs[1].d[1];
  return dims;
}

size_t Op::workspace(const nvinfer1::Dims& first) const {
  if (!has_capacity(kind_)) return 0;
  const int64_t batch = first.d[0], rows = first.d[1];
  const size_t counters = has_router(kind_) ? modcompile_route_rows_workspace(batch, rows) : 0;
  // `filled`, which nobody reads, and the mask as the kernel takes it.
  return counters + static_cast<size_t>(batch * (capacity_ + (is_masked(kind_) ? rows : 0)));
}

int Op::route(const nvinfer1::PluginTensorDesc* inputs, const void* const* tensors, void* const* outputs,
              void* workspace, cudaStream_t stream) const {
  const nvinfer1::Dims& first = inputs[0].dims;
  const int64_t batch = first.d[0], rows = first.d[1];
  // As `workspace` counts it. The counters are first, for their alignment.
  const size_t counters = has_router(kind_) ? modcompile_route_rows_workspace(batch, rows) : 0;
  uint8_t* filled = static_cast<uint8_t*>(workspace) + counters;
  uint8_t* valid = is_masked(kind_) ? filled + batch * capacity_ : nullptr;
  if (valid != nullptr) {
    const void* mask = tensors[input_count() - 1];
    if (const int code = narrow_mask(static_cast<const int32_t*>(mask), valid, batch * rows, stream)) return code;
  }
  if (!has_router(kind_)) {
    return modcompile_route(static_cast<const float*>(tensors[0]), valid, outputs[0], kIndexBytes, filled, batch, rows,
                            capacity_, stream);
  }
  // TensorRT's other layers write to this memory between two launches.
  if (const int code = cudaMemsetAsync(workspace, 0, counters, stream)) return code;
  return modcompile_route_rows(tensors[0], element_of(inputs[0].type), static_cast<const float*>(tensors[1]),
                               static_cast<const float*>(tensors[2]), valid, static_cast<float*>(outputs[0]),
                               outputs[1], kIndexBytes, filled, batch, rows, first.d[2], capacity_, workspace, stream);
}

int32_t Op::enqueue(const nvinfer1::PluginTensorDesc* inputs, const void* const* tensors, void* const* outputs,
                    void* workspace, cudaStream_t stream) const {
  const nvinfer1::Dims& first = inputs[0].dims;
  const int64_t batch = first.d[0], rows = first.d[1];
  int code = cudaErrorInvalidValue;
  if (has_capacity(kind_)) {
    code = route(inputs, tensors, outputs, workspace, stream);
  } else if (kind_ == Kind::kGatherRows) {
    int64_t row_bytes = bytes_of(inputs[0].type);
    for (int32_t axis = 2; axis < first.nbDims; ++axis) row_bytes *= first.d[axis];
    code = modcompile_gather_rows(tensors[0], tensors[1], kIndexBytes, outputs[0], batch, rows, inputs[1].dims.d[1],
                                  row_bytes, stream);
  } else {
    code = modcompile_merge_rows(tensors[0], tensors[1], tensors[2], kIndexBytes, tensors[3], outputs[0],
                                 element_of(inputs[0].type), batch, rows, inputs[2].dims.d[1], first.d[2], nullptr,
                                 stream);
  }
  if (code != cudaSuccess) log_error(kind_, cudaGetErrorString(static_cast<cudaError_t>(code)));
  return code;
}

}  // namespace modcompile

// What tells this library from another before it is loaded, for its bytes are searched: the package's version, that of
// the plugins, and the TensorRT whose headers it was built with. runtimes/trt/plugin_library.py reads it.
#define MODCOMPILE_TEXT_OF(x) #x
#define MODCOMPILE_TEXT(x) MODCOMPILE_TEXT_OF(x)
extern "C" MODCOMPILE_API const char* modcompile_trt_version() {
  return "modcompile TensorRT plugins: version " MODCOMPILE_VERSION ", plugins " MODCOMPILE_PLUGIN_VERSION
         ", TensorRT " MODCOMPILE_TEXT(NV_TENSORRT_MAJOR) "." MODCOMPILE_TEXT(NV_TENSORRT_MINOR) ";";
}
