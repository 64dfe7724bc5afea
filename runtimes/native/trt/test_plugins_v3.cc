// Drives the plugins of TensorRT 10 and 11 as TensorRT does, without it: creators and their fields, types, shapes,
// formats, workspace and aliases, serialization, clones; and enqueue on a GPU, against references written here.
//
//   test_plugins_v3 [--without-gpu]
//
// A registry and a logger of this file's stand in for TensorRT's.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "op.h"

using namespace nvinfer1;

namespace {

int checks = 0;

#define CHECK(condition)                                                                     \
  do {                                                                                       \
    ++checks;                                                                                \
    if (!(condition)) {                                                                      \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition);     \
      std::exit(1);                                                                          \
    }                                                                                        \
  } while (false)

class Registry final : public IPluginRegistry {
 public:
  std::map<std::string, IPluginCreatorInterface*> creators;

  bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* const plugin_namespace) noexcept override {
    auto& named = static_cast<IPluginCreatorV3One&>(creator);
    CHECK(std::string(creator.getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE");
    CHECK(std::string(plugin_namespace) == named.getPluginNamespace());
    return creators.emplace(named.getPluginName(), &creator).second;
  }
  void setErrorRecorder(IErrorRecorder* const) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool const) override {}
  PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  IPluginCreatorInterface* const* getAllCreators(int32_t* const) const noexcept override { return nullptr; }
  IPluginCreatorInterface* getCreator(AsciiChar const* const, AsciiChar const* const,
                                      AsciiChar const* const) noexcept override { return nullptr; }
  bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
  IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
  // Of some releases only.
  virtual IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept { return nullptr; }
#if NV_TENSORRT_MAJOR == 10
  bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(AsciiChar const* const, AsciiChar const* const,
                                   AsciiChar const* const) noexcept override { return nullptr; }
  bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
#endif
};

Registry& registry() {
  static Registry& only = *new Registry;
  return only;
}

class Logger final : public ILogger {
 public:
  std::string last;
  void log(Severity, AsciiChar const* text) noexcept override { last = text; }
};

Logger& logger() {
  static Logger& only = *new Logger;
  return only;
}

// Sizes as TensorRT's expressions: constants alone.
class Size final : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  explicit Size(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  int64_t value_;
};

class Sizes final : public IExprBuilder, public apiv::VExprBuilder {
 public:
  Sizes() { mImpl = this; }
  IDimensionExpr const* constant(int64_t value) override {
    made_.push_back(std::make_unique<Size>(value));
    return made_.back().get();
  }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }
  DimsExprs of(const std::vector<int64_t>& shape) {
    DimsExprs dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    for (size_t axis = 0; axis < shape.size(); ++axis) dims.d[axis] = constant(shape[axis]);
    return dims;
  }

 private:
  std::vector<std::unique_ptr<Size>> made_;
};

// What an op takes and gives, and its node's field.
struct Case {
  const char* name;
  std::vector<std::vector<int64_t>> inputs;
  std::vector<std::vector<int64_t>> outputs;
  std::vector<DataType> types;  // of the inputs, then of the outputs
  int32_t capacity;             // 0: no field
};

std::unique_ptr<IPluginV3> make(const Case& made, TensorRTPhase phase = TensorRTPhase::kBUILD) {
  const PluginField field("capacity", &made.capacity, PluginFieldType::kINT32, 1);
  const PluginFieldCollection fields{made.capacity == 0 ? 0 : 1, &field};
  auto& creator = static_cast<IPluginCreatorV3One&>(*registry().creators.at(made.name));
  return std::unique_ptr<IPluginV3>(creator.createPlugin("layers.1", &fields, phase));
}

IPluginV3OneCore& core(IPluginV3& plugin) {
  return *static_cast<IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
}
IPluginV3OneBuildV2& build(IPluginV3& plugin) {
  return *static_cast<IPluginV3OneBuildV2*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}
IPluginV3OneRuntime& runtime(IPluginV3& plugin) {
  return *static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

Dims dims_of(const std::vector<int64_t>& shape) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

std::vector<PluginTensorDesc> descriptions(const Case& made) {
  std::vector<PluginTensorDesc> all;
  for (size_t i = 0; i < made.types.size(); ++i) {
    PluginTensorDesc tensor{};
    tensor.dims = dims_of(i < made.inputs.size() ? made.inputs[i] : made.outputs[i - made.inputs.size()]);
    tensor.type = made.types[i];
    tensor.format = TensorFormat::kLINEAR;
    all.push_back(tensor);
  }
  return all;
}

std::vector<DynamicPluginTensorDesc> dynamic(const std::vector<PluginTensorDesc>& tensors) {
  std::vector<DynamicPluginTensorDesc> all;
  for (const PluginTensorDesc& tensor : tensors) {
    DynamicPluginTensorDesc made{};
    made.desc = tensor;
    made.min = made.max = made.opt = tensor.dims;
    all.push_back(made);
  }
  return all;
}

// Creators

void test_creators() {
  const std::vector<std::string> names = {"GatherRows", "MaskedRoute", "MaskedRouteRows",
                                          "MergeRows",  "Route",       "RouteRows"};
  CHECK(registry().creators.size() == names.size());
  for (const std::string& name : names) {
    auto& creator = static_cast<IPluginCreatorV3One&>(*registry().creators.at(name));
    CHECK(creator.getPluginVersion() == std::string("1"));
    CHECK(creator.getPluginNamespace() == std::string("modcompile"));
    const PluginFieldCollection& fields = *creator.getFieldNames();
    const bool routes = name.find("Route") != std::string::npos;
    CHECK(fields.nbFields == (routes ? 1 : 0));
    if (routes) {
      CHECK(fields.fields[0].name == std::string("capacity"));
      CHECK(fields.fields[0].type == PluginFieldType::kINT32);
    }
  }
}

void test_fields_that_are_no_capacity() {
  auto& creator = static_cast<IPluginCreatorV3One&>(*registry().creators.at("Route"));
  const int32_t zero = 0, five = 5;
  const int64_t wide = 5;
  const float real = 5;
  const auto create = [&](const char* name, const void* data, PluginFieldType type, int32_t length) {
    const PluginField field(name, data, type, length);
    const PluginFieldCollection fields{1, &field};
    logger().last.clear();
    return std::unique_ptr<IPluginV3>(creator.createPlugin("node", &fields, TensorRTPhase::kBUILD));
  };
  CHECK(create("capacity", &five, PluginFieldType::kINT32, 1) != nullptr);
  CHECK(create("capacity", &wide, PluginFieldType::kINT64, 1) != nullptr);
  CHECK(logger().last.empty());
  CHECK(create("capacity", &zero, PluginFieldType::kINT32, 1) == nullptr);
  CHECK(logger().last.find("Route") != std::string::npos && logger().last.find("capacity") != std::string::npos);
  CHECK(create("capacity", &real, PluginFieldType::kFLOAT32, 1) == nullptr);
  CHECK(create("capacity", nullptr, PluginFieldType::kINT32, 1) == nullptr);
  CHECK(create("capacity", &five, PluginFieldType::kINT32, 0) == nullptr);
  CHECK(create("k", &five, PluginFieldType::kINT32, 1) == nullptr);
  CHECK(creator.createPlugin("node", nullptr, TensorRTPhase::kBUILD) == nullptr);
}

// Building

constexpr DataType kEveryType[] = {DataType::kFLOAT, DataType::kHALF,  DataType::kINT8, DataType::kINT32, DataType::kBOOL,
                                   DataType::kUINT8, DataType::kFP8,   DataType::kBF16, DataType::kINT64, DataType::kINT4};

// The combinations of types that a plugin takes, all linear, tried as TensorRT tries them: tensor by tensor.
std::vector<std::vector<DataType>> combinations(IPluginV3& plugin, const Case& made) {
  std::vector<std::vector<DataType>> all = {{}};
  std::vector<PluginTensorDesc> tensors = descriptions(made);
  const auto inputs = static_cast<int32_t>(made.inputs.size()), outputs = static_cast<int32_t>(made.outputs.size());
  for (size_t at = 0; at < tensors.size(); ++at) {
    std::vector<std::vector<DataType>> longer;
    for (const std::vector<DataType>& before : all) {
      for (size_t i = 0; i < at; ++i) tensors[i].type = before[i];
      for (const DataType type : kEveryType) {
        tensors[at].type = type;
        for (const TensorFormat format : {TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8}) {
          tensors[at].format = format;
          const auto given = dynamic(tensors);
          if (!build(plugin).supportsFormatCombination(static_cast<int32_t>(at), given.data(), inputs, outputs)) continue;
          CHECK(format == TensorFormat::kLINEAR);
          longer.push_back(before);
          longer.back().push_back(type);
        }
        tensors[at].format = TensorFormat::kLINEAR;
      }
    }
    all = longer;
  }
  return all;
}

void test_building(const Case& made, const std::vector<std::vector<DataType>>& expected_types, int32_t alias) {
  const auto plugin = make(made);
  CHECK(plugin != nullptr);
  CHECK(core(*plugin).getPluginName() == std::string(made.name));
  CHECK(core(*plugin).getPluginVersion() == std::string("1"));
  CHECK(core(*plugin).getPluginNamespace() == std::string("modcompile"));
  IPluginV3OneBuildV2& builds = build(*plugin);
  CHECK(builds.getInterfaceInfo().major == 2);
  const auto inputs = static_cast<int32_t>(made.inputs.size()), outputs = static_cast<int32_t>(made.outputs.size());
  CHECK(builds.getNbOutputs() == outputs);
  CHECK(builds.getAliasedInput(0) == alias);

  std::vector<DataType> types(made.outputs.size(), DataType::kINT4);
  CHECK(builds.getOutputDataTypes(types.data(), outputs, made.types.data(), inputs) == 0);
  CHECK(types == std::vector<DataType>(made.types.begin() + inputs, made.types.end()));
  CHECK(builds.getOutputDataTypes(types.data(), outputs, made.types.data(), inputs + 1) != 0);
  CHECK(builds.getOutputDataTypes(types.data(), outputs + 1, made.types.data(), inputs) != 0);

  Sizes sizes;
  std::vector<DimsExprs> given, found(made.outputs.size());
  for (const auto& shape : made.inputs) given.push_back(sizes.of(shape));
  CHECK(builds.getOutputShapes(given.data(), inputs, nullptr, 0, found.data(), outputs, sizes) == 0);
  for (size_t i = 0; i < found.size(); ++i) {
    CHECK(found[i].nbDims == static_cast<int32_t>(made.outputs[i].size()));
    for (size_t axis = 0; axis < made.outputs[i].size(); ++axis) {
      CHECK(found[i].d[axis]->getConstantValue() == made.outputs[i][axis]);
    }
  }
  CHECK(builds.getOutputShapes(given.data(), inputs - 1, nullptr, 0, found.data(), outputs, sizes) != 0);

  CHECK(combinations(*plugin, made) == expected_types);
  const auto tensors = dynamic(descriptions(made));
  CHECK(builds.configurePlugin(tensors.data(), inputs, tensors.data() + inputs, outputs) == 0);
  CHECK(builds.configurePlugin(tensors.data(), inputs - 1, tensors.data() + inputs, outputs) != 0);
  const int64_t batch = made.inputs[0][0], rows = made.inputs[0][1];
  const std::string name = made.name;
  int64_t bytes = made.capacity == 0 ? 0 : batch * made.capacity;
  if (name.find("Masked") == 0) bytes += batch * rows;
  // A counter for each batch row.
  if (name.find("RouteRows") != std::string::npos) bytes += batch * 4;
  CHECK(builds.getWorkspaceSize(tensors.data(), inputs, tensors.data() + inputs, outputs) == static_cast<size_t>(bytes));
}

void test_serialization(const Case& made) {
  auto plugin = make(made);
  const PluginFieldCollection written = *runtime(*plugin).getFieldsToSerialize();
  CHECK(written.nbFields == (made.capacity == 0 ? 0 : 1));
  if (made.capacity != 0) {
    CHECK(written.fields[0].type == PluginFieldType::kINT32 && written.fields[0].length == 1);
    CHECK(*static_cast<const int32_t*>(written.fields[0].data) == made.capacity);
  }
  auto& creator = static_cast<IPluginCreatorV3One&>(*registry().creators.at(made.name));
  const std::unique_ptr<IPluginV3> read(creator.createPlugin("layers.1", &written, TensorRTPhase::kRUNTIME));
  const std::unique_ptr<IPluginV3> copy(read->clone());
  const std::unique_ptr<IPluginV3> attached(runtime(*read).attachToContext(nullptr));
  plugin.reset();
  for (IPluginV3* each : {read.get(), copy.get(), attached.get()}) {
    CHECK(core(*each).getPluginName() == std::string(made.name));
    const PluginFieldCollection again = *runtime(*each).getFieldsToSerialize();
    CHECK(again.nbFields == (made.capacity == 0 ? 0 : 1));
    if (made.capacity != 0) CHECK(*static_cast<const int32_t*>(again.fields[0].data) == made.capacity);
    const auto tensors = descriptions(made);
    const auto inputs = static_cast<int32_t>(made.inputs.size());
    CHECK(runtime(*each).onShapeChange(tensors.data(), inputs, tensors.data() + inputs,
                                       static_cast<int32_t>(made.outputs.size())) == 0);
  }
}

// Running

std::mt19937& random_bits() {
  static std::mt19937 generator(20240);
  return generator;
}

float random_real() { return std::normal_distribution<float>()(random_bits()); }

void check_cuda(cudaError_t code) {
  if (code != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(code));
  CHECK(code == cudaSuccess);
}

// Device memory with a copy of host values.
class Buffer {
 public:
  template <typename T>
  explicit Buffer(const std::vector<T>& values) : bytes_(values.size() * sizeof(T)) {
    check_cuda(cudaMalloc(&data_, std::max<size_t>(bytes_, 1)));
    check_cuda(cudaMemcpy(data_, values.data(), bytes_, cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  void* data() const { return data_; }
  template <typename T>
  std::vector<T> read() const {
    std::vector<T> values(bytes_ / sizeof(T));
    check_cuda(cudaMemcpy(values.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// Enqueues a plugin as a runtime makes it, recorded as a CUDA graph that is launched twice.
void enqueue(const Case& made, const std::vector<const void*>& inputs, const std::vector<void*>& outputs) {
  const auto built = make(made);
  const auto tensors = descriptions(made);
  const auto all = dynamic(tensors);
  const auto count = static_cast<int32_t>(made.inputs.size());
  const auto given = static_cast<int32_t>(made.outputs.size());
  const size_t bytes = build(*built).getWorkspaceSize(all.data(), count, all.data() + count, given);
  const Buffer workspace(std::vector<uint8_t>(bytes, 0xee));
  auto& creator = static_cast<IPluginCreatorV3One&>(*registry().creators.at(made.name));
  const std::unique_ptr<IPluginV3> read(
      creator.createPlugin("layers.1", runtime(*built).getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  const std::unique_ptr<IPluginV3> plugin(runtime(*read).attachToContext(nullptr));
  cudaStream_t stream{};
  cudaGraph_t graph{};
  cudaGraphExec_t replay{};
  check_cuda(cudaStreamCreate(&stream));
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  CHECK(runtime(*plugin).onShapeChange(tensors.data(), count, tensors.data() + count, given) == 0);
  CHECK(runtime(*plugin).enqueue(tensors.data(), tensors.data() + count, inputs.data(), outputs.data(),
                                 workspace.data(), stream) == 0);
  check_cuda(cudaStreamEndCapture(stream, &graph));
  check_cuda(cudaGraphInstantiate(&replay, graph, 0));
  check_cuda(cudaGraphLaunch(replay, stream));
  // In place, a second merge would merge what is merged.
  if (inputs[0] != outputs[0]) check_cuda(cudaGraphLaunch(replay, stream));
  check_cuda(cudaStreamSynchronize(stream));
  check_cuda(cudaGraphExecDestroy(replay));
  check_cuda(cudaGraphDestroy(graph));
  check_cuda(cudaStreamDestroy(stream));
}

// The contract: valid rows first, then the higher logit, NaN as -inf, then the lower position.
std::vector<int64_t> routed(const std::vector<float>& logits, const std::vector<int32_t>* valid, int64_t batch,
                            int64_t rows, int64_t capacity) {
  std::vector<int64_t> positions;
  for (int64_t b = 0; b < batch; ++b) {
    const auto score = [&](int64_t row) {
      const float logit = logits[static_cast<size_t>(b * rows + row)];
      return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;
    };
    const auto is_valid = [&](int64_t row) {
      return valid == nullptr || (*valid)[static_cast<size_t>(b * rows + row)] != 0;
    };
    std::vector<int64_t> order(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row) order[static_cast<size_t>(row)] = row;
    std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) {
      return is_valid(one) != is_valid(other) ? is_valid(one) : score(one) > score(other);
    });
    std::sort(order.begin(), order.begin() + capacity);
    positions.insert(positions.end(), order.begin(), order.begin() + capacity);
  }
  return positions;
}

void test_running_routes(int64_t batch, int64_t rows, int32_t capacity, int distinct) {
  std::vector<float> logits;
  std::vector<int32_t> valid;
  for (int64_t i = 0; i < batch * rows; ++i) {
    logits.push_back(distinct == 0 ? random_real() : static_cast<float>(random_bits()() % static_cast<unsigned>(distinct)));
    if (random_bits()() % 17 == 0) logits.back() = std::numeric_limits<float>::quiet_NaN();
    // Any nonzero is valid; later batch rows have fewer than K.
    valid.push_back(static_cast<int32_t>(random_bits()() % (i < rows ? 2 : 40) == 0) * 256);
  }
  const Buffer device_logits(logits), device_valid(valid);
  const std::vector<int64_t> poison(static_cast<size_t>(batch * capacity), -7);
  {
    const Case plain{"Route", {{batch, rows}}, {{batch, capacity}}, {DataType::kFLOAT, DataType::kINT64}, capacity};
    const Buffer output(poison);
    enqueue(plain, {device_logits.data()}, {output.data()});
    CHECK(output.read<int64_t>() == routed(logits, nullptr, batch, rows, capacity));
  }
  const Case masked{"MaskedRoute", {{batch, rows}, {batch, rows}}, {{batch, capacity}},
                    {DataType::kFLOAT, DataType::kINT32, DataType::kINT64}, capacity};
  const Buffer output(poison);
  enqueue(masked, {device_logits.data(), device_valid.data()}, {output.data()});
  CHECK(output.read<int64_t>() == routed(logits, &valid, batch, rows, capacity));
}

float widened(float value) { return value; }
float widened(__half value) { return __half2float(value); }
float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename T>
T narrowed(float value);
template <>
float narrowed(float value) { return value; }
template <>
__half narrowed(float value) { return __float2half_rn(value); }
template <>
__nv_bfloat16 narrowed(float value) { return __float2bfloat16_rn(value); }
template <>
int32_t narrowed(float value) { return static_cast<int32_t>(value * 1000); }
template <>
int64_t narrowed(float value) { return static_cast<int64_t>(value * 1e6F) << 20; }

template <typename T>
std::vector<T> random_values(int64_t count) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(narrowed<T>(random_real()));
  return values;
}

template <typename T>
bool same_bits(const std::vector<T>& one, const std::vector<T>& other) {
  return one.size() == other.size() && std::memcmp(one.data(), other.data(), one.size() * sizeof(T)) == 0;
}

std::vector<int64_t> random_positions(int64_t batch, int64_t rows, int64_t capacity) {
  return routed(random_values<float>(batch * rows), nullptr, batch, rows, capacity);
}

// Logits are compared with a sum in double, positions with the route of the logits that were given.
template <typename T>
void test_running_route_rows(DataType type, int64_t batch, int64_t rows, int32_t capacity, int64_t width) {
  const std::vector<T> x = random_values<T>(batch * rows * width);
  const std::vector<float> weight = random_values<float>(width), bias = {random_real()};
  std::vector<int32_t> valid;
  for (int64_t i = 0; i < batch * rows; ++i) valid.push_back(static_cast<int32_t>(random_bits()() % 3 == 0) * 256);
  const Buffer device_x(x), device_weight(weight), device_bias(bias), device_valid(valid);
  for (const bool masked : {false, true}) {
    Case made{"RouteRows", {{batch, rows, width}, {width}, {1}}, {{batch, rows}, {batch, capacity}},
              {type, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT64}, capacity};
    std::vector<const void*> inputs = {device_x.data(), device_weight.data(), device_bias.data()};
    if (masked) {
      made.name = "MaskedRouteRows";
      made.inputs.push_back({batch, rows});
      made.types.insert(made.types.begin() + 3, DataType::kINT32);
      inputs.push_back(device_valid.data());
    }
    const Buffer positions(std::vector<int64_t>(static_cast<size_t>(batch * capacity), -7));
    const Buffer logits(std::vector<float>(static_cast<size_t>(batch * rows), -7));
    enqueue(made, inputs, {logits.data(), positions.data()});
    const auto found = logits.read<float>();
    for (int64_t row = 0; row < batch * rows; ++row) {
      double sum = bias[0], size = std::abs(sum);
      for (int64_t i = 0; i < width; ++i) {
        const double product = static_cast<double>(widened(x[static_cast<size_t>(row * width + i)])) *
                               static_cast<double>(weight[static_cast<size_t>(i)]);
        sum += product;
        size += std::abs(product);
      }
      CHECK(std::abs(static_cast<double>(found[static_cast<size_t>(row)]) - sum) <= 1e-6 * size);
    }
    CHECK(positions.read<int64_t>() == routed(found, masked ? &valid : nullptr, batch, rows, capacity));
  }
}

template <typename T>
void test_running_gather(DataType type, int64_t batch, int64_t rows, int64_t capacity, int64_t width) {
  const std::vector<T> x = random_values<T>(batch * rows * width);
  const std::vector<int64_t> positions = random_positions(batch, rows, capacity);
  std::vector<T> expected;
  for (int64_t slot = 0; slot < batch * capacity; ++slot) {
    const auto row = x.begin() + (slot / capacity * rows + positions[static_cast<size_t>(slot)]) * width;
    expected.insert(expected.end(), row, row + width);
  }
  const Case made{"GatherRows", {{batch, rows, width}, {batch, capacity}}, {{batch, capacity, width}},
                  {type, DataType::kINT64, type}, 0};
  const Buffer device_x(x), device_positions(positions), output(std::vector<uint8_t>(expected.size() * sizeof(T), 0xee));
  enqueue(made, {device_x.data(), device_positions.data()}, {output.data()});
  CHECK(same_bits(output.read<T>(), expected));
}

template <typename T>
void test_running_merge(DataType type, int64_t batch, int64_t rows, int64_t capacity, int64_t width) {
  const std::vector<T> x = random_values<T>(batch * rows * width), y = random_values<T>(batch * capacity * width);
  const std::vector<int64_t> positions = random_positions(batch, rows, capacity);
  std::vector<T> gates = random_values<T>(batch * capacity);
  for (size_t slot = 0; slot < gates.size(); slot += 3) gates[slot] = narrowed<T>(static_cast<float>(slot / 3 % 2));
  std::vector<T> expected = x;
  for (int64_t slot = 0; slot < batch * capacity; ++slot) {
    const float gate = widened(gates[static_cast<size_t>(slot)]);
    for (int64_t i = 0; i < width; ++i) {
      T& to = expected[static_cast<size_t>((slot / capacity * rows + positions[static_cast<size_t>(slot)]) * width + i)];
      const T from = y[static_cast<size_t>(slot * width + i)];
      // A volatile step is rounded, whatever the compiler would fuse.
      const volatile float difference = widened(narrowed<T>(widened(from) - widened(to)));
      const volatile float product = widened(narrowed<T>(gate * difference));
      if (gate == 1) to = from;
      else if (gate != 0) to = narrowed<T>(widened(to) + product);
    }
  }
  const Case made{"MergeRows", {{batch, rows, width}, {batch, capacity, width}, {batch, capacity}, {batch, capacity}},
                  {{batch, rows, width}}, {type, type, DataType::kINT64, type, type}, 0};
  const Buffer device_x(x), device_y(y), device_positions(positions), device_gates(gates);
  const Buffer output(std::vector<uint8_t>(expected.size() * sizeof(T), 0xee));
  const std::vector<const void*> inputs = {device_x.data(), device_y.data(), device_positions.data(), device_gates.data()};
  enqueue(made, inputs, {output.data()});
  CHECK(same_bits(output.read<T>(), expected));
  CHECK(same_bits(device_x.read<T>(), x));
  // Aliased.
  enqueue(made, inputs, {device_x.data()});
  CHECK(same_bits(device_x.read<T>(), expected));
}

void test_a_launch_that_cannot_be() {
  const Case made{"Route", {{2, 4}}, {{2, 9}}, {DataType::kFLOAT, DataType::kINT64}, 9};
  const auto plugin = make(made);
  const auto tensors = descriptions(made);
  const Buffer logits(std::vector<float>(8)), output(std::vector<int64_t>(18)), workspace(std::vector<uint8_t>(18));
  const void* const inputs[] = {logits.data()};
  void* const outputs[] = {output.data()};
  logger().last.clear();
  CHECK(runtime(*plugin).enqueue(tensors.data(), tensors.data() + 1, inputs, outputs, workspace.data(), nullptr) != 0);
  CHECK(logger().last.find("Route") != std::string::npos);
}

void test_running() {
  for (const int distinct : {0, 3, 1}) {
    test_running_routes(1, 1, 1, distinct);
    test_running_routes(3, 63, 5, distinct);
    test_running_routes(2, 63, 63, distinct);
    test_running_routes(8, 1024, 128, distinct);
    test_running_routes(2, 8192, 1024, distinct);
  }
  for (const int64_t width : {1, 33, 64, 1024}) {
    test_running_route_rows<float>(DataType::kFLOAT, 2, 63, 5, width);
    test_running_route_rows<__half>(DataType::kHALF, 3, 1024, 128, width);
    test_running_route_rows<__nv_bfloat16>(DataType::kBF16, 1, 9, 9, width);
    test_running_gather<float>(DataType::kFLOAT, 2, 63, 5, width);
    test_running_gather<__half>(DataType::kHALF, 3, 1024, 128, width);
    test_running_gather<__nv_bfloat16>(DataType::kBF16, 1, 9, 9, width);
    test_running_gather<int32_t>(DataType::kINT32, 2, 63, 1, width);
    test_running_gather<int64_t>(DataType::kINT64, 2, 63, 7, width);
    test_running_merge<float>(DataType::kFLOAT, 2, 63, 5, width);
    test_running_merge<__half>(DataType::kHALF, 3, 1024, 128, width);
    test_running_merge<__nv_bfloat16>(DataType::kBF16, 2, 9, 9, width);
  }
  test_a_launch_that_cannot_be();
}

}  // namespace

extern "C" IPluginRegistry* getPluginRegistry() noexcept { return &registry(); }
extern "C" ILogger* getLogger() noexcept { return &logger(); }

int main(int count, char** arguments) {
  const bool without_gpu = count > 1 && std::string(arguments[1]) == "--without-gpu";
  constexpr DataType kReal = DataType::kFLOAT, kHalf = DataType::kHALF, kBrain = DataType::kBF16;
  constexpr DataType kInt = DataType::kINT32, kLong = DataType::kINT64;
  const Case route{"Route", {{2, 63}}, {{2, 5}}, {kReal, kLong}, 5};
  const Case masked_route{"MaskedRoute", {{2, 63}, {2, 63}}, {{2, 5}}, {kReal, kInt, kLong}, 5};
  const Case route_rows{"RouteRows", {{2, 63, 24}, {24}, {1}}, {{2, 63}, {2, 5}},
                        {kHalf, kReal, kReal, kReal, kLong}, 5};
  const Case masked_route_rows{"MaskedRouteRows", {{2, 63, 24}, {24}, {1}, {2, 63}}, {{2, 63}, {2, 5}},
                               {kHalf, kReal, kReal, kInt, kReal, kLong}, 5};
  const Case gather{"GatherRows", {{2, 63, 3, 4}, {2, 5}}, {{2, 5, 3, 4}}, {kHalf, kLong, kHalf}, 0};
  const Case merge{"MergeRows", {{2, 63, 4}, {2, 5, 4}, {2, 5}, {2, 5}}, {{2, 63, 4}},
                   {kHalf, kHalf, kLong, kHalf, kHalf}, 0};
  test_creators();
  test_fields_that_are_no_capacity();
  test_building(route, {{kReal, kLong}}, -1);
  test_building(masked_route, {{kReal, kInt, kLong}}, -1);
  test_building(route_rows, {{kReal, kReal, kReal, kReal, kLong}, {kHalf, kReal, kReal, kReal, kLong},
                             {kBrain, kReal, kReal, kReal, kLong}}, -1);
  test_building(masked_route_rows, {{kReal, kReal, kReal, kInt, kReal, kLong}, {kHalf, kReal, kReal, kInt, kReal, kLong},
                                    {kBrain, kReal, kReal, kInt, kReal, kLong}}, -1);
  test_building(gather, {{kReal, kLong, kReal}, {kHalf, kLong, kHalf}, {kInt, kLong, kInt}, {kBrain, kLong, kBrain},
                         {kLong, kLong, kLong}}, -1);
  test_building(merge, {{kReal, kReal, kLong, kReal, kReal}, {kHalf, kHalf, kLong, kHalf, kHalf},
                        {kBrain, kBrain, kLong, kBrain, kBrain}}, 0);
  for (const Case& made : {route, masked_route, route_rows, masked_route_rows, gather, merge}) test_serialization(made);
  if (!without_gpu) test_running();
  std::printf("%d checks passed%s\n", checks, without_gpu ? ", none of them of enqueue" : "");
  return 0;
}
