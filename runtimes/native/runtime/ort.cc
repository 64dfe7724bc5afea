// The back end ONNX Runtime: a session with the options that the Python package gives it, and IO binding.

#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>
#include <onnxruntime_run_options_config_keys.h>
#include <onnxruntime_session_options_config_keys.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <filesystem>
#include <mutex>
#include <utility>

#include "backend.h"
#include "library.h"
#include "manifest.h"
#include "text.h"

namespace modcompile {
namespace {

constexpr const char* kCuda = "CUDAExecutionProvider";
constexpr const char* kCpu = "CPUExecutionProvider";
// The custom-op library's name in a bundle, and the version of the ops.
constexpr const char* kLibrary = "libmodcompile_ort.so";
constexpr int kDomainVersion = 1;

// In the order of DType.
constexpr std::array<ONNXTensorElementDataType, 13> kTypes = {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL,    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16,  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16,  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,   ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,   ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE};

ONNXTensorElementDataType type_of(DType dtype) { return kTypes[static_cast<size_t>(dtype)]; }

// ONNX Runtime's API, of the version of the headers; null where the library is older than they are.
const OrtApi* api() {
  static const OrtApi* const found = [] {
    const OrtApi* api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (api != nullptr) Ort::InitApi(api);
    return api;
  }();
  return found;
}

// Where an engine on a GPU runs.
struct Gpu {
  int device;
  void* stream;
  bool cuda_graph;
};

class OrtRunner final : public Runner {
 public:
  // gpu: Null where the engine runs on the CPU. graph: What this caller's CUDA graph is called. turn: Held by runs of
  // graphs.
  OrtRunner(Ort::Session& session, const Manifest& manifest, const Gpu* gpu, int graph, std::mutex& turn)
      : session_(session), manifest_(manifest), gpu_(gpu), turn_(turn), binding_(session),
        host_(Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault)), device_(nullptr) {
    if (gpu == nullptr) return;
    device_ = Ort::MemoryInfo("Cuda", OrtDeviceAllocator, gpu->device, OrtMemTypeDefault);
    without_waiting_.AddConfigEntry(kOrtRunOptionsConfigDisableSynchronizeExecutionProviders, "1");
    if (!gpu->cuda_graph) return;
    for (Ort::RunOptions* options : {&waiting_, &without_waiting_}) {
      options->AddConfigEntry(kOrtRunOptionsConfigCudaGraphAnnotation, std::to_string(graph).c_str());
    }
  }

  void run(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers,
           std::vector<Output>& outputs) override {
    for (Output& output : outputs) output.data = nullptr;
    bool all_device = !inputs.empty();
    for (const Input* input : inputs) all_device = all_device && input->memory == Memory::kDevice;
    const Memory own = all_device ? Memory::kDevice : Memory::kHost;
    for (const Buffer* buffer : buffers) {
      all_device = all_device && (buffer == nullptr || buffer->memory == Memory::kDevice);
    }
    const bool is_graph = gpu_ != nullptr && gpu_->cuda_graph;
    // A graph keeps to the memory that it was recorded with, and the engine lets no other come here.
    if (!is_graph || bound_.empty()) bind(inputs, buffers, own);
    // What is copied to or from the host is complete when the run returns.
    const bool waits = !all_device || gpu_->stream == nullptr;
    const auto turn = is_graph ? std::unique_lock(turn_) : std::unique_lock<std::mutex>();
    session_.Run(waits ? waiting_ : without_waiting_, binding_);
    values_.clear();
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (buffers[i] != nullptr) {
        outputs[i].shape = buffers[i]->shape;
        outputs[i].data = buffers[i]->data;
        outputs[i].memory = buffers[i]->memory;
        continue;
      }
      if (values_.empty()) values_ = binding_.GetOutputValues();
      outputs[i].shape = values_[i].GetTensorTypeAndShapeInfo().GetShape();
      outputs[i].data = values_[i].GetTensorRawData();
      outputs[i].memory = own;
    }
  }

 private:
  // What is bound takes the place of what was. A tensor that stays where it was is bound already, but for the inputs of
  // an engine on a GPU: one that ONNX Runtime reads on another device, it copies when it is bound.
  void bind(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers, Memory own) {
    values_.clear();
    // Whatever throws below, the next run binds all.
    std::vector<Place> places = std::exchange(bound_, {});
    places.resize(inputs.size() + buffers.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Input* input = inputs[i];
      if (gpu_ == nullptr && places[i].has(input)) continue;
      // ONNX Runtime has one type for tensors that it reads and that it writes; inputs it reads.
      binding_.BindInput(input->name.c_str(), wrap(*input, const_cast<void*>(input->data)));
      places[i].keep(input);
    }
    for (size_t i = 0; i < buffers.size(); ++i) {
      const char* name = manifest_.outputs[i].name.c_str();
      const Buffer* buffer = buffers[i];
      Place& place = places[inputs.size() + i];
      if (place.has(buffer)) continue;
      if (buffer != nullptr) {
        binding_.BindOutput(name, wrap(*buffer, buffer->data));
      } else if (gpu_ != nullptr && gpu_->cuda_graph) {
        binding_.BindOutput(name, fixed(i));
      } else {
        binding_.BindOutput(name, memory(own));
      }
      place.keep(buffer);
    }
    bound_ = std::move(places);
  }

  const OrtMemoryInfo* memory(Memory where) const { return where == Memory::kHost ? host_ : device_; }

  template <typename Tensor>
  Ort::Value wrap(const Tensor& tensor, void* data) const {
    return Ort::Value::CreateTensor(memory(tensor.memory), data, bytes_of(tensor.dtype, tensor.shape),
                                    tensor.shape.data(), tensor.shape.size(), type_of(tensor.dtype));
  }

  // Memory for an output of a graph, which stays where it is.
  const Ort::Value& fixed(size_t index) {
    if (fixed_.empty()) {
      for (size_t i = 0; i < manifest_.outputs.size(); ++i) fixed_.emplace_back(nullptr);
    }
    if (!fixed_[index]) {
      const TensorSpec& spec = manifest_.outputs[index];
      std::vector<int64_t> shape;
      for (const Dim& dim : spec.shape) shape.push_back(dim.size);
      if (!allocator_) allocator_ = Ort::Allocator(session_, device_);
      fixed_[index] = Ort::Value::CreateTensor(allocator_, shape.data(), shape.size(), type_of(spec.dtype));
    }
    return fixed_[index];
  }

  Ort::Session& session_;
  const Manifest& manifest_;
  const Gpu* gpu_;
  std::mutex& turn_;
  Ort::IoBinding binding_;
  Ort::MemoryInfo host_, device_;
  Ort::RunOptions waiting_, without_waiting_;
  Ort::Allocator allocator_{nullptr};
  std::vector<Place> bound_;
  // The memory of outputs without a buffer, and the outputs of the last run.
  std::vector<Ort::Value> fixed_, values_;
};

class OrtBackend final : public Backend {
 public:
  OrtBackend(const Manifest& manifest, Ort::Env env, Ort::Session session, std::optional<Gpu> gpu)
      : manifest_(manifest), env_(std::move(env)), session_(std::move(session)), gpu_(gpu) {}

  const char* name() const override { return "ONNX Runtime"; }
  bool on_gpu() const override { return gpu_.has_value(); }

  std::unique_ptr<Runner> make_runner(void* stream) const override {
    if (gpu_ && stream != gpu_->stream) {
      throw Error(ErrorKind::kUsage, "an engine on ONNX Runtime has one stream",
                  {"the stream that the engine was loaded with", "another one", "stream",
                   "load the engine with this stream"});
    }
    return std::make_unique<OrtRunner>(session_, manifest_, gpu_ ? &*gpu_ : nullptr, ++graphs_, turn_);
  }

 private:
  const Manifest& manifest_;
  Ort::Env env_;
  // Its runs change nothing that another run sees, but for those of graphs, which take turns.
  mutable Ort::Session session_;
  mutable std::mutex turn_;
  // ONNX Runtime keeps 0 for itself.
  mutable std::atomic<int> graphs_{0};
  std::optional<Gpu> gpu_;
};

void check_providers(const std::vector<std::string>& names) {
  const std::vector<std::string> available = Ort::GetAvailableProviders();
  for (const std::string& name : names) {
    if (std::find(available.begin(), available.end(), name) == available.end()) {
      throw Error(ErrorKind::kRuntimeUnavailable, "this ONNX Runtime does not have the execution provider",
                  {joined(available), name, "onnxruntime " + Ort::GetVersionString(),
                   "link a release of ONNX Runtime that has it, or name other providers"});
    }
    if (name != kCpu && name != kCuda) {
      throw Error(ErrorKind::kRuntimeUnavailable, "this library does not start the execution provider",
                  {joined({kCuda, kCpu}), name, "providers", "name other providers"});
    }
  }
}

void append_cuda(Ort::SessionOptions& options, const Gpu& gpu) {
  OrtCUDAProviderOptionsV2* cuda = nullptr;
  Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
  const std::unique_ptr<OrtCUDAProviderOptionsV2, void (*)(OrtCUDAProviderOptionsV2*)> owned(
      cuda, [](OrtCUDAProviderOptionsV2* value) { Ort::GetApi().ReleaseCUDAProviderOptions(value); });
  const std::string device = std::to_string(gpu.device);
  const std::pair<const char*, const char*> pairs[] = {
      {"device_id", device.c_str()},
      // Products of float32 stay in float32: otherwise their factors are rounded to 10 bits.
      {"use_tf32", "0"},
      // Memory is taken as it is needed, not in powers of two, up to half of which would lie idle.
      {"arena_extend_strategy", "kSameAsRequested"},
      {"enable_cuda_graph", gpu.cuda_graph ? "1" : "0"},
  };
  std::vector<const char*> keys, values;
  for (const auto& [key, value] : pairs) {
    keys.push_back(key);
    values.push_back(value);
  }
  try {
    // All at once: a call puts the options that it does not name back to ONNX Runtime's own.
    Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(cuda, keys.data(), values.data(), keys.size()));
  } catch (const Ort::Exception& error) {
    throw Error(ErrorKind::kRuntimeUnavailable, "ONNX Runtime does not run on this GPU",
                {"a GPU that the driver lists", "cuda:" + device + ": " + error.what(), "device",
                 "name another device; nvidia-smi lists what there is"});
  }
  if (gpu.stream != nullptr) {
    Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptionsWithValue(cuda, "user_compute_stream", gpu.stream));
  }
  options.AppendExecutionProvider_CUDA_V2(*cuda);
}

constexpr LibraryKind kCustomOps = {"the custom-op library",
                                    "build runtimes/native with -DMODCOMPILE_ORT=ON on a machine like this one"};

template <typename Function>
Function* function_of(void* library, const char* name, const std::string& where) {
  void* const found = dlsym(library, name);
  if (found == nullptr) {
    throw Error(ErrorKind::kRuntimeUnavailable, "the library is not modcompile's custom-op library",
                {kLibrary, std::string("no function ") + name, where, kCustomOps.fix});
  }
  return reinterpret_cast<Function*>(found);
}

void register_custom_ops(Ort::SessionOptions& options, void* library, const std::string& where,
                         const std::optional<Gpu>& gpu) {
  const int domain_version = function_of<int()>(library, "modcompile_ort_domain_version", where)();
  const std::string version = function_of<const char*()>(library, "modcompile_ort_version", where)();
  const std::string kernels = function_of<const char*()>(library, "modcompile_ort_providers", where)();
  if (domain_version != kDomainVersion) {
    throw Error(ErrorKind::kRuntimeUnavailable, "the custom-op library has another version of the ops",
                {"version " + std::to_string(kDomainVersion) + " of the domain modcompile",
                 "version " + std::to_string(domain_version) + ", of modcompile " + version, where, kCustomOps.fix});
  }
  // They would run on the CPU, between copies there and back.
  if (gpu && kernels.find(kCuda) == std::string::npos) {
    throw Error(ErrorKind::kRuntimeUnavailable, "the custom-op library has no kernels for CUDA",
                {kCuda, kernels, where, "build the engine with a library for CUDA, or load it without custom ops"});
  }
  if (gpu) {
    const char* const reason = function_of<const char*(int)>(library, "modcompile_ort_cuda_error", where)(gpu->device);
    if (reason != nullptr) {
      throw Error(ErrorKind::kRuntimeUnavailable, "the custom-op library's kernels do not run on this GPU",
                  {"kernels for the architecture of cuda:" + std::to_string(gpu->device), reason, where,
                   "build runtimes/native for this GPU's architecture, or load the engine without custom ops"});
    }
  }
  using Register = OrtStatus*(OrtSessionOptions*, const OrtApiBase*);
  try {
    Ort::ThrowOnError(function_of<Register>(library, "RegisterCustomOps", where)(options, OrtGetApiBase()));
  } catch (const Ort::Exception& error) {
    throw Error(ErrorKind::kRuntimeUnavailable, "ONNX Runtime does not take the custom-op library",
                {"ops for onnxruntime " + Ort::GetVersionString(), error.what(), where, "build the library again"});
  }
}

TensorSpec spec_of(const std::string& name, const Ort::TypeInfo& info, const std::string& path) {
  if (info.GetONNXType() == ONNX_TYPE_TENSOR) {
    const Ort::ConstTensorTypeAndShapeInfo tensor = info.GetTensorTypeAndShapeInfo();
    const auto type = std::find(kTypes.begin(), kTypes.end(), tensor.GetElementType());
    if (type != kTypes.end()) {
      TensorSpec spec{name, static_cast<DType>(type - kTypes.begin()), {}};
      const std::vector<int64_t> sizes = tensor.GetShape();
      std::vector<const char*> symbols(sizes.size());
      tensor.GetSymbolicDimensions(symbols.data(), symbols.size());
      for (size_t axis = 0; axis < sizes.size(); ++axis) {
        const std::string symbol = symbols[axis];
        if (sizes[axis] > 0) {
          spec.shape.push_back({sizes[axis], ""});
        } else {
          spec.shape.push_back({0, symbol.empty() ? name + "_" + std::to_string(axis) : symbol});
        }
      }
      return spec;
    }
  }
  throw Error(ErrorKind::kUnsupportedGraph, "the model has an input or output that is not a tensor of numbers",
              {"tensors of numbers", name, path, ""});
}

// The model's own inputs and outputs must be the manifest's. Outputs' shapes are inferred, and each release of ONNX
// Runtime infers what it can.
void check_interface(const Ort::Session& session, const Manifest& manifest, const std::string& path) {
  const Ort::AllocatorWithDefaultOptions allocator;
  std::vector<TensorSpec> inputs, outputs;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    inputs.push_back(spec_of(session.GetInputNameAllocated(i, allocator).get(), session.GetInputTypeInfo(i), path));
  }
  for (size_t i = 0; i < session.GetOutputCount(); ++i) {
    outputs.push_back(spec_of(session.GetOutputNameAllocated(i, allocator).get(), session.GetOutputTypeInfo(i), path));
  }
  const auto same_type = [](const TensorSpec& one, const TensorSpec& other) {
    return one.name == other.name && one.dtype == other.dtype;
  };
  if (inputs != manifest.inputs || !std::equal(outputs.begin(), outputs.end(), manifest.outputs.begin(),
                                               manifest.outputs.end(), same_type)) {
    throw Error(ErrorKind::kIntegrity, "the model's inputs or outputs are not those of its manifest",
                {texts_of(manifest.inputs, "; ") + "; " + texts_of(manifest.outputs, "; "),
                 texts_of(inputs, "; ") + "; " + texts_of(outputs, "; "), path, ""});
  }
}

Error not_opened(const Ort::Exception& error, const std::string& path, const std::vector<std::string>& providers) {
  const std::string text = error.what();
  if (error.GetOrtErrorCode() == ORT_INVALID_PROTOBUF || text.find("No graph was found") != std::string::npos) {
    return {ErrorKind::kIntegrity, "the file is not a complete ONNX model", {"", text, path, ""}};
  }
  if (is_out_of_memory(text)) {
    return {ErrorKind::kOther, "there is too little memory for the engine", {"", text, path, kMoreMemory}};
  }
  // A library of the provider's that is missing, or a GPU, is a failure of no kind in ONNX Runtime.
  if (error.GetOrtErrorCode() == ORT_EP_FAIL || text.find("libonnxruntime_providers") != std::string::npos ||
      text.find("CUDA failure") != std::string::npos) {
    return {ErrorKind::kRuntimeUnavailable, "an execution provider did not start", {joined(providers), text, path, ""}};
  }
  return {ErrorKind::kUnsupportedGraph, "ONNX Runtime does not run this model", {"", text, path, ""}};
}

}  // namespace

std::unique_ptr<Backend> load_ort(const std::string& folder, const Manifest& manifest, const LoadOptions& options) {
  const std::string version = OrtGetApiBase()->GetVersionString();
  if (!runs_on(manifest, version)) {
    const std::string range = "onnxruntime>=" + manifest.runtime_minimum +
                              (manifest.runtime_below.empty() ? "" : ",<" + manifest.runtime_below);
    throw Error(ErrorKind::kRuntimeUnavailable, "this version of ONNX Runtime cannot load the engine",
                {range, version, folder, "let the program load a library of these versions"});
  }
  if (api() == nullptr) {
    throw Error(ErrorKind::kRuntimeUnavailable, "ONNX Runtime is older than the headers of this library",
                {"a library with version " + std::to_string(ORT_API_VERSION) + " of the API",
                 "onnxruntime " + version, "", "let the program load a newer library, or build with its headers"});
  }
  const std::string path = folder + "/" + manifest.entry;
  const std::vector<std::string>& providers = options.providers.empty() ? manifest.providers : options.providers;
  check_providers(providers);
  std::optional<Gpu> gpu;
  if (std::find(providers.begin(), providers.end(), kCuda) != providers.end()) {
    gpu = {options.device, options.stream, options.cuda_graph};
  } else {
    refuse_gpu_options(options, joined(providers));
  }
  try {
    // What goes wrong is thrown; by default it is printed as well.
    Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "modcompile");
    Ort::SessionOptions session;
    session.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
    session.SetGraphOptimizationLevel(ORT_ENABLE_ALL);
    if (options.intra_op_threads > 0) session.SetIntraOpNumThreads(options.intra_op_threads);
    session.AddConfigEntry(kOrtSessionOptionsModelExternalInitializersFileFolderPath,
                           std::filesystem::absolute(folder).c_str());
    if (options.custom_ops && manifest.files.count(kLibrary) > 0) {
      const std::string where = folder + "/" + kLibrary, content = read_verified(folder, manifest, kLibrary);
      void* const library = open_library(content, manifest.files.at(kLibrary).sha256, kCustomOps, where);
      register_custom_ops(session, library, where, gpu);
    }
    // The CPU's provider is always there, last.
    if (gpu) append_cuda(session, *gpu);
    const std::string model = read_verified(folder, manifest, manifest.entry);
    Ort::Session opened(env, model.data(), model.size(), session);
    check_interface(opened, manifest, path);
    return std::make_unique<OrtBackend>(manifest, std::move(env), std::move(opened), gpu);
  } catch (const Ort::Exception& error) {
    throw not_opened(error, path, providers);
  }
}

}  // namespace modcompile
