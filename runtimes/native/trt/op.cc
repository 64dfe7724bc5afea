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
enum class Role { kLogits, kMask, kPosition, kElement };

constexpr int32_t kMostTensors = 5;
struct Tensors {
  int32_t count;  // with the output
  Role roles[kMostTensors];
};

constexpr Tensors tensors_of(Kind kind) {
  switch (kind) {
    case Kind::kRoute:
      return {2, {Role::kLogits, Role::kPosition}};
    case Kind::kMaskedRoute:
      return {3, {Role::kLogits, Role::kMask, Role::kPosition}};
    case Kind::kGatherRows:
      return {3, {Role::kElement, Role::kPosition, Role::kElement}};
    case Kind::kMergeRows:
      return {5, {Role::kElement, Role::kElement, Role::kPosition, Role::kElement, Role::kElement}};
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

int32_t Op::input_count() const { return tensors_of(kind_).count - 1; }

bool Op::takes(int32_t index, DataType type, DataType first) const {
  const Tensors tensors = tensors_of(kind_);
  if (index < 0 || index >= tensors.count) return false;
  switch (tensors.roles[index]) {
    case Role::kLogits:
      return type == DataType::kFLOAT;
    case Role::kMask:
      return type == DataType::kINT32;
    case Role::kPosition:
      return type == kPositions;
    case Role::kElement:
      return type == first && (kind_ == Kind::kMergeRows ? is_merged(type) : is_gathered(type));
  }
  return false;
}

DataType Op::output_type(DataType first) const { return has_capacity(kind_) ? kPositions : first; }

nvinfer1::DimsExprs Op::output_dims(const nvinfer1::DimsExprs* inputs, nvinfer1::IExprBuilder& builder) const {
  nvinfer1::DimsExprs dims = inputs[0];
  if (has_capacity(kind_)) dims.d[1] = builder.constant(capacity_);
  if (kind_ == Kind::kGatherRows) dims.d[1] = inputs[1].d[1];
  return dims;
}

size_t Op::workspace(const nvinfer1::Dims& first) const {
  if (!has_capacity(kind_)) return 0;
  // `filled`, which nobody reads, and the mask as the kernel takes it.
  const int64_t per_batch_row = capacity_ + (kind_ == Kind::kMaskedRoute ? first.d[1] : 0);
  return static_cast<size_t>(first.d[0] * per_batch_row);
}

int32_t Op::enqueue(const nvinfer1::PluginTensorDesc* inputs, const void* const* tensors, void* output, void* workspace,
                    cudaStream_t stream) const {
  const nvinfer1::Dims& first = inputs[0].dims;
  const int64_t batch = first.d[0], rows = first.d[1];
  int code = cudaErrorInvalidValue;
  if (has_capacity(kind_)) {
    auto* filled = static_cast<uint8_t*>(workspace);
    uint8_t* valid = nullptr;
    code = cudaSuccess;
    if (kind_ == Kind::kMaskedRoute) {
      valid = filled + batch * capacity_;
      code = narrow_mask(static_cast<const int32_t*>(tensors[1]), valid, batch * rows, stream);
    }
    if (code == cudaSuccess) {
      code = modcompile_route(static_cast<const float*>(tensors[0]), valid, output, kIndexBytes, filled, batch, rows,
                              capacity_, stream);
    }
  } else if (kind_ == Kind::kGatherRows) {
    int64_t row_bytes = bytes_of(inputs[0].type);
    for (int32_t axis = 2; axis < first.nbDims; ++axis) row_bytes *= first.d[axis];
    code = modcompile_gather_rows(tensors[0], tensors[1], kIndexBytes, output, batch, rows, inputs[1].dims.d[1],
                                  row_bytes, stream);
  } else {
    code = modcompile_merge_rows(tensors[0], tensors[1], tensors[2], kIndexBytes, tensors[3], output,
                                 element_of(inputs[0].type), batch, rows, inputs[2].dims.d[1], first.d[2], nullptr,
                                 stream);
  }
  if (code != cudaSuccess) log_error(kind_, cudaGetErrorString(static_cast<cudaError_t>(code)));
  return code;
}

}  // namespace modcompile

// The package's version that the plugins were built with: what tells this library from another.
extern "C" MODCOMPILE_API const char* modcompile_trt_version() { return MODCOMPILE_VERSION; }
