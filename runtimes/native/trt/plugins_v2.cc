// The plugins for TensorRT 8.6, by the interface IPluginV2DynamicExt.

#include <cstring>

#include "op.h"

namespace modcompile {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;

class Plugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  explicit Plugin(const Op& op) : op_(op) {}

  const char* getPluginType() const noexcept override { return name_of(op_.kind()); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  void setPluginNamespace(const char*) noexcept override {}
  int32_t getNbOutputs() const noexcept override { return op_.output_count(); }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  Plugin* clone() const noexcept override { return new Plugin(op_); }

  DataType getOutputDataType(int32_t output, const DataType* inputs, int32_t) const noexcept override {
    return op_.output_type(output, inputs[0]);
  }

  DimsExprs getOutputDimensions(int32_t output, const DimsExprs* inputs, int32_t,
                                nvinfer1::IExprBuilder& builder) noexcept override {
    return op_.output_dims(output, inputs, builder);
  }

  bool supportsFormatCombination(int32_t at, const PluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return inputs == op_.input_count() && outputs == op_.output_count() &&
           tensors[at].format == nvinfer1::TensorFormat::kLINEAR && op_.takes(at, tensors[at].type, tensors[0].type);
  }

  void configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                       int32_t) noexcept override {}

  size_t getWorkspaceSize(const PluginTensorDesc* inputs, int32_t, const PluginTensorDesc*,
                          int32_t) const noexcept override {
    return op_.workspace(inputs[0].dims);
  }

  int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*, const void* const* tensors,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return op_.enqueue(inputs, tensors, outputs, workspace, stream);
  }

  // In an engine, a plugin is its capacity.
  size_t getSerializationSize() const noexcept override { return sizeof(int32_t); }
  void serialize(void* buffer) const noexcept override {
    const int32_t capacity = op_.capacity();
    std::memcpy(buffer, &capacity, sizeof(capacity));
  }

 private:
  Op op_;
};

class Creator final : public nvinfer1::IPluginCreator {
 public:
  explicit Creator(Kind kind) : kind_(kind) {}

  const char* getPluginName() const noexcept override { return name_of(kind_); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  void setPluginNamespace(const char*) noexcept override {}
  const PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }

  Plugin* createPlugin(const char*, const PluginFieldCollection* fields) noexcept override {
    int32_t capacity = 0;
    return fields != nullptr && read_fields(kind_, *fields, &capacity) ? new Plugin(Op(kind_, capacity)) : nullptr;
  }

  Plugin* deserializePlugin(const char*, const void* data, size_t size) noexcept override {
    int32_t capacity = 0;
    if (data == nullptr || size != sizeof(capacity)) {
      log_error(kind_, "the engine was built with another version of the plugins");
      return nullptr;
    }
    std::memcpy(&capacity, data, sizeof(capacity));
    return new Plugin(Op(kind_, capacity));
  }

 private:
  Kind kind_;
  nvinfer1::PluginField capacity_{kCapacityField, nullptr, nvinfer1::PluginFieldType::kINT32, 1};
  PluginFieldCollection fields_{has_capacity(kind_) ? 1 : 0, &capacity_};
};

// Loading the library is enough. The registry keeps the creators, so they are never freed.
const bool registered = [] {
  bool all = true;
  for (const Kind kind : kKinds) {
    all = getPluginRegistry()->registerCreator(*new Creator(kind), kNamespace) && all;
  }
  return all;
}();

}  // namespace
}  // namespace modcompile
