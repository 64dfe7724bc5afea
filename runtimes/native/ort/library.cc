// libmodcompile_ort.so: the ops of the domain `modcompile` as ONNX Runtime's custom ops.
//
// A model's nodes of that domain carry function bodies of standard operators; with this library registered ONNX Runtime
// runs these kernels in their place. On the CPU always, on CUDA where the library was built with it.

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <string>
#include <vector>

#include "ops.h"

namespace modcompile {
namespace {

constexpr const char* kDomain = "modcompile";
// The version of the domain: of what the ops take, give and mean.
constexpr int kDomainVersion = 1;
// The API version that has all that is used here; the newest of it is GetMayInplace.
constexpr uint32_t kOldestApi = 18;

#ifdef MODCOMPILE_CUDA
constexpr const char* kProviders = "CPUExecutionProvider CUDAExecutionProvider";
#else
constexpr const char* kProviders = "CPUExecutionProvider";
#endif

constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr ONNXTensorElementDataType kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
constexpr ONNXTensorElementDataType kBool = ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
// In a kernel's list of inputs and outputs, the type that the op was made for.
constexpr ONNXTensorElementDataType kElement = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

// Of the rows that a router reads, or a norm.
constexpr std::array kRoutedTypes = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                     ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16};
constexpr std::array kGatheredTypes = {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL,    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64};

int64_t bytes_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return 1;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return 2;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return 4;
    default:
      return 8;
  }
}

using Shape = std::vector<int64_t>;

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

void require(bool holds, const std::string& expected, const Shape& found) {
  if (!holds) ORT_CXX_API_THROW("expected " + expected + ", found " + text_of(found), ORT_INVALID_ARGUMENT);
}

// A tensor that a kernel reads: its shape, and its memory on the kernel's device.
struct Input {
  explicit Input(const Ort::ConstValue& value)
      : shape(value.GetTensorTypeAndShapeInfo().GetShape()), data(value.GetTensorRawData()) {}

  template <typename T>
  const T* as() const { return static_cast<const T*>(data); }

  Shape shape;
  const void* data;
};

void* output(const Ort::KernelContext& context, size_t index, const Shape& shape) {
  return context.GetOutput(index, shape).GetTensorMutableRawData();
}

// The kernels. Each says which op it is of and which types that has, checks shapes, and asks its device.

// The capacity K: a constant as a rule, otherwise read in each call.
class Capacity {
 public:
  Capacity(const OrtKernelInfo* info, size_t input) : input_(input) {
    int is_constant = 0;
    const Ort::ConstValue value = Ort::ConstKernelInfo(info).GetTensorConstantInput(input, &is_constant);
    // Where a constant is shared with a node on a device, it may lie there; the call's is always the host's.
    if (is_constant != 0 && value.GetTensorMemoryInfo().GetDeviceType() == OrtMemoryInfoDeviceType_CPU) {
      constant_ = *value.GetTensorData<int64_t>();
    }
  }

  int64_t of(const Ort::KernelContext& context, int64_t rows) const {
    const int64_t capacity = constant_ != 0 ? constant_ : *context.GetInput(input_).GetTensorData<int64_t>();
    if (capacity < 1 || capacity > rows) {
      ORT_CXX_API_THROW("expected a capacity from 1 to " + std::to_string(rows) + " rows, found " +
                            std::to_string(capacity),
                        ORT_INVALID_ARGUMENT);
    }
    return capacity;
  }

 private:
  size_t input_;
  int64_t constant_ = 0;
};

// What a route reads and writes beside the logits [B, S]: a mask, and two outputs.
template <bool kMasked>
Route route_of(const Ort::KernelContext& context, const Capacity& capacity, const float* logits, int64_t batch,
               int64_t rows, size_t mask_input, size_t first_output) {
  const bool* valid = nullptr;
  if constexpr (kMasked) {
    const Input mask(context.GetInput(mask_input));
    require(mask.shape == Shape{batch, rows}, "valid " + text_of({batch, rows}), mask.shape);
    valid = mask.as<bool>();
  }
  const Shape chosen = {batch, capacity.of(context, rows)};
  auto* positions = static_cast<int64_t*>(output(context, first_output, chosen));
  auto* filled = static_cast<bool*>(output(context, first_output + 1, chosen));
  return {logits, valid, positions, filled, batch, rows, chosen[1]};
}

template <typename On, bool kMasked>
class RouteKernel {
 public:
  using Device = On;
  static constexpr const char* kName = kMasked ? "MaskedRoute" : "Route";
  static constexpr size_t kMask = 1;
  static constexpr int kHostInput = kMasked ? 2 : 1;  // the capacity
  static constexpr std::array<int, 0> kInPlaceOf = {};

  static std::vector<ONNXTensorElementDataType> inputs() {
    return kMasked ? std::vector{kFloat, kBool, kInt64} : std::vector{kFloat, kInt64};
  }
  static std::vector<ONNXTensorElementDataType> outputs() { return {kInt64, kBool}; }

  RouteKernel(const OrtKernelInfo* info, ONNXTensorElementDataType) : capacity_(info, kHostInput) {}

  void compute(const Ort::KernelContext& context) const {
    const Input logits(context.GetInput(0));
    require(logits.shape.size() == 2, "logits [B, S]", logits.shape);
    const Route route = route_of<kMasked>(context, capacity_, logits.as<float>(), logits.shape[0], logits.shape[1],
                                          kMask, 0);
    if (route.batch != 0) Device(context).run(route);
  }

 private:
  Capacity capacity_;
};

template <typename On>
using PlainRouteKernel = RouteKernel<On, false>;
template <typename On>
using MaskedRouteKernel = RouteKernel<On, true>;

template <typename On, bool kMasked>
class RouteRowsKernel {
 public:
  using Device = On;
  static constexpr const char* kName = kMasked ? "MaskedRouteRows" : "RouteRows";
  static constexpr size_t kMask = 3;
  static constexpr int kHostInput = kMasked ? 4 : 3;  // the capacity
  static constexpr std::array<int, 0> kInPlaceOf = {};

  static std::vector<ONNXTensorElementDataType> inputs() {
    return kMasked ? std::vector{kElement, kFloat, kFloat, kBool, kInt64} : std::vector{kElement, kFloat, kFloat, kInt64};
  }
  static std::vector<ONNXTensorElementDataType> outputs() { return {kFloat, kInt64, kBool}; }

  RouteRowsKernel(const OrtKernelInfo* info, ONNXTensorElementDataType element)
      : capacity_(info, kHostInput), element_(element) {}

  void compute(const Ort::KernelContext& context) const {
    const Input x(context.GetInput(0)), weight(context.GetInput(1)), bias(context.GetInput(2));
    require(x.shape.size() == 3 && x.shape[2] > 0, "x [B, S, D]", x.shape);
    const int64_t batch = x.shape[0], rows = x.shape[1], width = x.shape[2];
    require(weight.shape == Shape{width, 1}, "weight " + text_of({width, 1}), weight.shape);
    require(bias.shape == Shape{1}, "bias [1]", bias.shape);
    auto* logits = static_cast<float*>(output(context, 0, {batch, rows}));
    const Route route = route_of<kMasked>(context, capacity_, logits, batch, rows, kMask, 1);
    if (batch == 0) return;
    Device(context).run(RouteRows{x.data, weight.as<float>(), bias.as<float>(), logits, element_, width, route}, kept_);
  }

 private:
  Capacity capacity_;
  mutable typename Device::Kept kept_;  // guards itself
  ONNXTensorElementDataType element_;
};

template <typename On>
using PlainRouteRowsKernel = RouteRowsKernel<On, false>;
template <typename On>
using MaskedRouteRowsKernel = RouteRowsKernel<On, true>;

// A layer norm takes a bias, and one for the product; an RMS norm takes neither.
template <typename On, bool kCentered, bool kMasked>
class SkipNormRouteRowsKernel {
 public:
  using Device = On;
  static constexpr const char* kName = kCentered ? (kMasked ? "MaskedSkipLayerNormRouteRows" : "SkipLayerNormRouteRows")
                                                 : (kMasked ? "MaskedSkipRmsNormRouteRows" : "SkipRmsNormRouteRows");
  static constexpr size_t kNormWeight = 2, kNormBias = 3, kProductBias = 4;
  static constexpr size_t kWeight = kCentered ? 5 : 3, kBias = kWeight + 1, kMask = kBias + 1;
  static constexpr int kHostInput = static_cast<int>(kMask) + (kMasked ? 1 : 0);  // the capacity
  static constexpr std::array<int, 0> kInPlaceOf = {};

  static std::vector<ONNXTensorElementDataType> inputs() {
    std::vector types = {kElement, kElement, kElement};
    if (kCentered) types.insert(types.end(), {kElement, kElement});
    types.insert(types.end(), {kFloat, kFloat});
    if (kMasked) types.push_back(kBool);
    types.push_back(kInt64);
    return types;
  }
  static std::vector<ONNXTensorElementDataType> outputs() { return {kElement, kElement, kFloat, kInt64, kBool}; }

  SkipNormRouteRowsKernel(const OrtKernelInfo* info, ONNXTensorElementDataType element)
      : epsilon_(Ort::ConstKernelInfo(info).GetAttribute<float>("epsilon")),
        capacity_(info, kHostInput),
        element_(element) {}

  void compute(const Ort::KernelContext& context) const {
    const Input product(context.GetInput(0)), residual(context.GetInput(1)), norm_weight(context.GetInput(kNormWeight));
    const Input weight(context.GetInput(kWeight)), bias(context.GetInput(kBias));
    require(product.shape.size() == 3 && product.shape[2] > 0, "product [B, S, D]", product.shape);
    require(residual.shape == product.shape, "residual " + text_of(product.shape), residual.shape);
    const int64_t batch = product.shape[0], rows = product.shape[1], width = product.shape[2];
    require(norm_weight.shape == Shape{width}, "norm_weight " + text_of({width}), norm_weight.shape);
    require(weight.shape == Shape{width, 1}, "weight " + text_of({width, 1}), weight.shape);
    require(bias.shape == Shape{1}, "bias [1]", bias.shape);
    const void *norm_bias = nullptr, *product_bias = nullptr;
    if constexpr (kCentered) {
      const Input of_norm(context.GetInput(kNormBias)), of_product(context.GetInput(kProductBias));
      require(of_norm.shape == Shape{width}, "norm_bias " + text_of({width}), of_norm.shape);
      require(of_product.shape == Shape{width}, "product_bias " + text_of({width}), of_product.shape);
      norm_bias = of_norm.data;
      product_bias = of_product.data;
    }
    void* normed = output(context, 0, product.shape);
    void* summed = output(context, 1, product.shape);
    auto* logits = static_cast<float*>(output(context, 2, {batch, rows}));
    const Route route = route_of<kMasked>(context, capacity_, logits, batch, rows, kMask, 3);
    if (batch == 0) return;
    const RouteRows router = {summed, weight.as<float>(), bias.as<float>(), logits, element_, width, route};
    Device(context).run(SumNormRouteRows{residual.data, product.data, product_bias, norm_weight.data, norm_bias,
                                         epsilon_, kCentered, summed, normed, router},
                        kept_);
  }

 private:
  float epsilon_;
  Capacity capacity_;
  mutable typename Device::Kept kept_;  // guards itself
  ONNXTensorElementDataType element_;
};

template <typename On>
using SkipLayerNormRouteRowsKernel = SkipNormRouteRowsKernel<On, true, false>;
template <typename On>
using MaskedSkipLayerNormRouteRowsKernel = SkipNormRouteRowsKernel<On, true, true>;
template <typename On>
using SkipRmsNormRouteRowsKernel = SkipNormRouteRowsKernel<On, false, false>;
template <typename On>
using MaskedSkipRmsNormRouteRowsKernel = SkipNormRouteRowsKernel<On, false, true>;

template <typename On>
class GatherRowsKernel {
 public:
  using Device = On;
  static constexpr const char* kName = "GatherRows";
  static constexpr int kHostInput = -1;
  static constexpr std::array<int, 0> kInPlaceOf = {};

  static std::vector<ONNXTensorElementDataType> inputs() { return {kElement, kInt64}; }
  static std::vector<ONNXTensorElementDataType> outputs() { return {kElement}; }

  GatherRowsKernel(const OrtKernelInfo*, ONNXTensorElementDataType element) : element_bytes_(bytes_of(element)) {}

  void compute(const Ort::KernelContext& context) const {
    const Input x(context.GetInput(0)), positions(context.GetInput(1));
    require(x.shape.size() >= 2, "x [B, S, ...]", x.shape);
    require(positions.shape.size() == 2 && positions.shape[0] == x.shape[0],
            "positions [" + std::to_string(x.shape[0]) + ", K]", positions.shape);
    Shape shape = x.shape;
    shape[1] = positions.shape[1];
    int64_t row_bytes = element_bytes_;
    for (size_t axis = 2; axis < shape.size(); ++axis) row_bytes *= shape[axis];
    void* out = output(context, 0, shape);
    if (shape[0] * shape[1] * row_bytes == 0) return;
    Device(context).run(GatherRows{x.data, positions.as<int64_t>(), out, shape[0], x.shape[1], shape[1], row_bytes});
  }

 private:
  int64_t element_bytes_;
};

// A layer norm takes a bias, an RMS norm none.
template <typename On, bool kCentered>
class GatherNormKernel {
 public:
  using Device = On;
  static constexpr const char* kName = kCentered ? "GatherLayerNorm" : "GatherRmsNorm";
  static constexpr int kHostInput = -1;
  static constexpr std::array<int, 0> kInPlaceOf = {};

  static std::vector<ONNXTensorElementDataType> inputs() {
    return kCentered ? std::vector{kElement, kInt64, kElement, kElement} : std::vector{kElement, kInt64, kElement};
  }
  static std::vector<ONNXTensorElementDataType> outputs() { return {kElement, kElement}; }

  GatherNormKernel(const OrtKernelInfo* info, ONNXTensorElementDataType element)
      : epsilon_(Ort::ConstKernelInfo(info).GetAttribute<float>("epsilon")), element_(element) {}

  void compute(const Ort::KernelContext& context) const {
    const Input x(context.GetInput(0)), positions(context.GetInput(1)), weight(context.GetInput(2));
    require(x.shape.size() == 3, "x [B, S, D]", x.shape);
    require(positions.shape.size() == 2 && positions.shape[0] == x.shape[0],
            "positions [" + std::to_string(x.shape[0]) + ", K]", positions.shape);
    const int64_t batch = x.shape[0], rows = x.shape[1], width = x.shape[2], capacity = positions.shape[1];
    require(weight.shape == Shape{width}, "weight " + text_of({width}), weight.shape);
    const void* bias = nullptr;
    if constexpr (kCentered) {
      const Input given(context.GetInput(3));
      require(given.shape == Shape{width}, "bias " + text_of({width}), given.shape);
      bias = given.data;
    }
    const Shape shape = {batch, capacity, width};
    void* out = output(context, 0, shape);
    void* normed = output(context, 1, shape);
    if (batch * capacity * width == 0) return;
    Device(context).run(GatherNormRows{x.data, positions.as<int64_t>(), weight.data, bias, epsilon_, kCentered, out,
                                       normed, element_, batch, rows, capacity, width});
  }

 private:
  float epsilon_;
  ONNXTensorElementDataType element_;
};

template <typename On>
using GatherLayerNormKernel = GatherNormKernel<On, true>;
template <typename On>
using GatherRmsNormKernel = GatherNormKernel<On, false>;

// The merge of the inputs x, y, positions and gate into the first output.
MergeRows merge_of(const Ort::KernelContext& context, ONNXTensorElementDataType element) {
  const Input x(context.GetInput(0)), y(context.GetInput(1)), positions(context.GetInput(2)), gate(context.GetInput(3));
  require(x.shape.size() == 3, "x [B, S, D]", x.shape);
  require(positions.shape.size() == 2 && positions.shape[0] == x.shape[0],
          "positions [" + std::to_string(x.shape[0]) + ", K]", positions.shape);
  const int64_t batch = x.shape[0], rows = x.shape[1], width = x.shape[2], capacity = positions.shape[1];
  const Shape updates = {batch, capacity, width};
  require(y.shape == updates, "y " + text_of(updates), y.shape);
  require(gate.shape == positions.shape, "gate " + text_of(positions.shape), gate.shape);
  void* out = output(context, 0, x.shape);
  if (batch * rows * width != 0) {
    require(1 <= capacity && capacity <= rows, "from 1 to " + std::to_string(rows) + " positions", positions.shape);
  }
  return {x.data, y.data, positions.as<int64_t>(), gate.data, out, element, batch, rows, capacity, width};
}

template <typename On>
class MergeRowsKernel {
 public:
  using Device = On;
  static constexpr const char* kName = "MergeRows";
  static constexpr int kHostInput = -1;
  static constexpr std::array kInPlaceOf = {0};

  static std::vector<ONNXTensorElementDataType> inputs() { return {kElement, kElement, kInt64, kElement}; }
  static std::vector<ONNXTensorElementDataType> outputs() { return {kElement}; }

  MergeRowsKernel(const OrtKernelInfo*, ONNXTensorElementDataType element) : element_(element) {}

  void compute(const Ort::KernelContext& context) const {
    const MergeRows merge = merge_of(context, element_);
    if (merge.batch * merge.rows * merge.width != 0) Device(context).run(merge);
  }

 private:
  ONNXTensorElementDataType element_;
};

template <typename On>
class MergeRowPairsKernel {
 public:
  using Device = On;
  static constexpr const char* kName = "MergeRowPairs";
  static constexpr size_t kOtherX = 4, kOtherY = 5;
  static constexpr int kHostInput = -1;
  static constexpr std::array kInPlaceOf = {0, static_cast<int>(kOtherX)};

  static std::vector<ONNXTensorElementDataType> inputs() {
    return {kElement, kElement, kInt64, kElement, kElement, kElement};
  }
  static std::vector<ONNXTensorElementDataType> outputs() { return {kElement, kElement}; }

  MergeRowPairsKernel(const OrtKernelInfo*, ONNXTensorElementDataType element) : element_(element) {}

  void compute(const Ort::KernelContext& context) const {
    const MergeRows first = merge_of(context, element_);
    const Input x(context.GetInput(kOtherX)), y(context.GetInput(kOtherY));
    const Shape whole = {first.batch, first.rows, first.width}, updates = {first.batch, first.capacity, first.width};
    require(x.shape == whole, "other_x " + text_of(whole), x.shape);
    require(y.shape == updates, "other_y " + text_of(updates), y.shape);
    void* out = output(context, 1, whole);
    if (first.batch * first.rows * first.width != 0) {
      Device(context).run(MergeRowPairs{first, x.data, y.data, out});
    }
  }

 private:
  ONNXTensorElementDataType element_;
};

// ONNX Runtime takes a status where C++ would throw.
template <typename Body>
OrtStatus* guarded(Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::Status(error).release();
  } catch (const std::exception& error) {
    return Ort::Status(error).release();
  }
}

template <typename Kernel>
struct Guarded : Kernel {
  using Kernel::Kernel;
  OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
    return guarded([=] { this->compute(Ort::KernelContext(context)); });
  }
};

// A kernel's op, for one element type. ONNX Runtime makes one schema of all ops of a name.
template <typename Kernel>
struct Op : Ort::CustomOpBase<Op<Kernel>, Guarded<Kernel>, true> {
  Op(uint32_t api_version, ONNXTensorElementDataType type)
      : element(type), input_types(Kernel::inputs()), output_types(Kernel::outputs()) {
    OrtCustomOp::version = api_version;
    std::replace(input_types.begin(), input_types.end(), kElement, element);
    std::replace(output_types.begin(), output_types.end(), kElement, element);
    if constexpr (!Kernel::kInPlaceOf.empty()) {
      // Input kInPlaceOf[i] may be output i.
      OrtCustomOp::GetMayInplace = [](int** from, int** to) -> size_t {
        constexpr size_t count = Kernel::kInPlaceOf.size();
        *from = new int[count];
        *to = new int[count];
        std::copy(Kernel::kInPlaceOf.begin(), Kernel::kInPlaceOf.end(), *from);
        std::iota(*to, *to + count, 0);
        return count;
      };
      OrtCustomOp::ReleaseMayInplace = [](int* from, int* to) {
        delete[] from;
        delete[] to;
      };
      // Only a result that is known to be as large as its input can take its place. Other shapes are in the file.
      // Whatever the node's type, ONNX Runtime asks the first op of the name.
      OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
        return guarded([=] {
          const OrtApi& api = Ort::GetApi();
          const Ort::ShapeInferContext shapes(&api, context);
          const auto is_unknown = [](const auto& dim) { return dim.IsInt() && dim.AsInt() < 0; };
          for (size_t i = 0; i < Kernel::kInPlaceOf.size(); ++i) {
            const auto input = static_cast<size_t>(Kernel::kInPlaceOf[i]);
            const auto& shape = shapes.GetInputShape(input);
            if (shape.empty() || std::any_of(shape.begin(), shape.end(), is_unknown)) continue;
            OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
            Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, input, &info));
            Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, i, info));
          }
        });
      };
    }
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([=] { *kernel = new Guarded<Kernel>(info, element); });
  }

  const char* GetName() const { return Kernel::kName; }
  const char* GetExecutionProviderType() const { return Kernel::Device::kProvider; }
  size_t GetInputTypeCount() const { return input_types.size(); }
  ONNXTensorElementDataType GetInputType(size_t index) const { return input_types[index]; }
  OrtMemType GetInputMemoryType(size_t index) const {
    return static_cast<int>(index) == Kernel::kHostInput ? OrtMemTypeCPUInput : OrtMemTypeDefault;
  }
  size_t GetOutputTypeCount() const { return output_types.size(); }
  ONNXTensorElementDataType GetOutputType(size_t index) const { return output_types[index]; }

  ONNXTensorElementDataType element;
  std::vector<ONNXTensorElementDataType> input_types, output_types;
};

// The domain and its ops. ONNX Runtime keeps pointers to them in every session, so they are never freed.
class Library {
 public:
  explicit Library(uint32_t api_version) : api_version_(api_version), domain_(kDomain) {
    add_device<Cpu>();
#ifdef MODCOMPILE_CUDA
    add_device<Cuda>();
#endif
  }

  const Ort::CustomOpDomain& domain() const { return domain_; }

 private:
  template <typename Device>
  void add_device() {
    add<PlainRouteKernel<Device>>(kFloat);
    add<MaskedRouteKernel<Device>>(kFloat);
    for (const auto type : kRoutedTypes) {
      add<PlainRouteRowsKernel<Device>>(type);
      add<MaskedRouteRowsKernel<Device>>(type);
      add<SkipLayerNormRouteRowsKernel<Device>>(type);
      add<MaskedSkipLayerNormRouteRowsKernel<Device>>(type);
      add<SkipRmsNormRouteRowsKernel<Device>>(type);
      add<MaskedSkipRmsNormRouteRowsKernel<Device>>(type);
      add<GatherLayerNormKernel<Device>>(type);
      add<GatherRmsNormKernel<Device>>(type);
    }
    for (const auto type : kGatheredTypes) add<GatherRowsKernel<Device>>(type);
    for (const auto type : Device::kMergedTypes) {
      add<MergeRowsKernel<Device>>(type);
      add<MergeRowPairsKernel<Device>>(type);
    }
  }

  template <typename Kernel>
  void add(ONNXTensorElementDataType type) { domain_.Add(new Op<Kernel>(api_version_, type)); }

  uint32_t api_version_;
  Ort::CustomOpDomain domain_;
};

}  // namespace
}  // namespace modcompile

#define MODCOMPILE_API __attribute__((visibility("default")))

// What a loader asks before it registers the ops: the version of the domain that they are of, the version of the package
// they were built with, and the execution providers that have kernels in here.
extern "C" MODCOMPILE_API int modcompile_ort_domain_version() { return modcompile::kDomainVersion; }
extern "C" MODCOMPILE_API const char* modcompile_ort_version() { return MODCOMPILE_VERSION; }
extern "C" MODCOMPILE_API const char* modcompile_ort_providers() { return modcompile::kProviders; }

extern "C" MODCOMPILE_API OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                    const OrtApiBase* base) {
  using namespace modcompile;
  // Of "1.24.0" the API version is 24. An older ONNX Runtime has the older half of the API that these headers declare.
  const int minor = std::atoi(std::string(base->GetVersionString()).substr(2).c_str());
  const uint32_t api_version = std::min<uint32_t>(ORT_API_VERSION, static_cast<uint32_t>(minor));
  if (api_version < kOldestApi) {
    return base->GetApi(1)->CreateStatus(
        ORT_NOT_IMPLEMENTED, ("modcompile's custom ops need ONNX Runtime 1." + std::to_string(kOldestApi)).c_str());
  }
  Ort::InitApi(base->GetApi(api_version));
  return guarded([=] {
    static const Library& library = *new Library(api_version);
    Ort::ThrowOnError(Ort::GetApi().AddCustomOpDomain(options, library.domain()));
  });
}
