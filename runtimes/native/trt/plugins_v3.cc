// The plugins for TensorRT 10 and 11, by the interface IPluginV3.

#include "op.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 7)
#error "These plugins need TensorRT 10.7 or later, which has IPluginV3OneBuildV2; plugins_v2.cc is for 8.6."
#endif

namespace modcompile {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(const Op& op) : op_(op) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  Plugin* clone() noexcept override { return new Plugin(op_); }

  const char* getPluginName() const noexcept override { return name_of(op_.kind()); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return op_.output_count(); }

  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                             int32_t input_count) const noexcept override {
    if (!fits(input_count, output_count)) return 1;
    for (int32_t i = 0; i < output_count; ++i) outputs[i] = op_.output_type(i, inputs[0]);
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept override {
    if (!fits(input_count, output_count)) return 1;
    for (int32_t i = 0; i < output_count; ++i) outputs[i] = op_.output_dims(i, inputs, builder);
    return 0;
  }

  bool supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return fits(inputs, outputs) && tensors[at].desc.format == nvinfer1::TensorFormat::kLINEAR &&
           op_.takes(at, tensors[at].desc.type, tensors[0].desc.type);
  }

  // The merged rows take x's memory where the builder's preview feature kALIASED_PLUGIN_IO_10_03 is on; TensorRT copies x
  // first if something else reads it. Where it is off, nobody asks.
  int32_t getAliasedInput(int32_t) noexcept override { return op_.kind() == Kind::kMergeRows ? 0 : -1; }

  int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t outputs) noexcept override {
    return fits(inputs, outputs) ? 0 : 1;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    return op_.workspace(inputs[0].max);
  }

  int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
    return 0;
  }

  int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*, const void* const* tensors,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return op_.enqueue(inputs, tensors, outputs, workspace, stream);
  }

  Plugin* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    capacity_ = op_.capacity();
    return &fields_;
  }

 private:
  bool fits(int32_t inputs, int32_t outputs) const {
    return inputs == op_.input_count() && outputs == op_.output_count();
  }

  Op op_;
  int32_t capacity_ = 0;
  PluginField field_{kCapacityField, &capacity_, nvinfer1::PluginFieldType::kINT32, 1};
  PluginFieldCollection fields_{has_capacity(op_.kind()) ? 1 : 0, &field_};
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(Kind kind) : kind_(kind) {}

  const char* getPluginName() const noexcept override { return name_of(kind_); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }

  Plugin* createPlugin(const char*, const PluginFieldCollection* fields, nvinfer1::TensorRTPhase) noexcept override {
    int32_t capacity = 0;
    return fields != nullptr && read_fields(kind_, *fields, &capacity) ? new Plugin(Op(kind_, capacity)) : nullptr;
  }

 private:
  Kind kind_;
  PluginField capacity_{kCapacityField, nullptr, nvinfer1::PluginFieldType::kINT32, 1};
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
