// The back end TensorRT, of releases 8.6 to 11 from one source: an engine by its tensors' names, enqueueV3, and CUDA's
// runtime for memory, streams and graphs. A plugin library of the bundle's is loaded before the engine is read.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <regex>
#include <stdexcept>
#include <utility>

#include "backend.h"
#include "library.h"
#include "manifest.h"
#include "text.h"

namespace modcompile {
namespace {

constexpr const char* kLibrary = "libmodcompile_trt.so";
constexpr const char* kPluginVersion = "1";
constexpr LibraryKind kPlugins = {"the plugin library",
                                  "build runtimes/native with -DMODCOMPILE_TRT=ON and the headers of this TensorRT"};
constexpr const char* kCapability = "compute_capability";
// Kernels may read so much at once that a tensor must begin at a multiple of it.
constexpr uintptr_t kAlignmentBytes = 256;

// In the order of DType, by TensorRT's numbers, which are the same in every release: 7 and 8 are of 10 and later.
constexpr std::array<int, 13> kTypes = {4, 5, 2, -1, -1, -1, 3, -1, 8, 1, 7, 0, -1};

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

void accept(bool accepted, const std::string& what) {
  if (!accepted) throw std::runtime_error("TensorRT refuses " + what);
}

// Keeps errors for messages, and prints nothing.
class Log final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard<std::mutex> lock(turn_);
      errors_.emplace_back(text);
    } catch (const std::exception&) {
      // Without memory the message is lost, and what failed is still said.
    }
  }

  // What was logged since the last call.
  std::string take() {
    const std::lock_guard<std::mutex> lock(turn_);
    const std::string text = errors_.empty() ? "no reason given" : joined(errors_, "; ");
    errors_.clear();
    return text;
  }

 private:
  std::mutex turn_;
  std::vector<std::string> errors_;
};

// Makes a GPU the current one, and the one before again.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Device memory that grows.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(data_); }

  void* of_size(size_t bytes) {
    if (bytes > size_) {
      // Waits for what still uses it.
      cudaFree(std::exchange(data_, nullptr));
      size_ = 0;
      check(cudaMalloc(&data_, bytes), "cudaMalloc");
      size_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  cudaMemcpyKind kind;
};

bool varies(const TensorSpec& spec) {
  return std::any_of(spec.shape.begin(), spec.shape.end(), [](const Dim& dim) { return !dim.symbol.empty(); });
}

nvinfer1::Dims dims_of(const std::vector<int64_t>& shape, const std::string& name) {
  nvinfer1::Dims dims{};
  accept(shape.size() <= nvinfer1::Dims::MAX_DIMS, "so many dims of " + name);
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    dims.d[axis] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(shape[axis]);
    // Sizes have 32 bits before TensorRT 10.
    accept(dims.d[axis] == shape[axis], "the size of " + name);
  }
  return dims;
}

std::vector<int64_t> shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

// An engine, and what its runs share.
struct Opened {
  Log log;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  int device;
  bool cuda_graph;
};

class TrtRunner final : public Runner {
 public:
  TrtRunner(Opened& opened, const Manifest& manifest, void* stream)
      : opened_(opened), manifest_(manifest), staged_(manifest.inputs.size()), own_(manifest.outputs.size()),
        host_(manifest.outputs.size()), stream_(static_cast<cudaStream_t>(stream)), callers_(stream != nullptr) {
    const OnDevice current(opened_.device);
    context_.reset(opened_.engine->createExecutionContext());
    if (context_ == nullptr) {
      throw Error(ErrorKind::kRuntimeUnavailable, "there is too little memory to run the engine",
                  {"", opened_.log.take(), "", "free memory of the GPU, or build the engine for smaller shapes"});
    }
    // On the default stream TensorRT would wait for the GPU before and after its work.
    if (!callers_) check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  TrtRunner(const TrtRunner&) = delete;
  TrtRunner& operator=(const TrtRunner&) = delete;
  ~TrtRunner() override {
    cudaStreamSynchronize(stream_);
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    if (!callers_) cudaStreamDestroy(stream_);
  }

  void run(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers,
           std::vector<Output>& outputs) override {
    const OnDevice current(opened_.device);
    try {
      if (graph_ != nullptr) {
        check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
        if (!callers_) check(cudaStreamSynchronize(stream_), "a run");
        return;
      }
      if (!is_placed(inputs, buffers)) place_all(inputs, buffers, outputs);
      launch();
      if (!callers_ || !all_device_) check(cudaStreamSynchronize(stream_), "a run");
      // TensorRT wants a run at these sizes before one that is recorded.
      if (opened_.cuda_graph) record();
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string(error.what()) + "; " + opened_.log.take());
    }
  }

 private:
  static bool fits(const void* data, Memory memory) {
    return memory == Memory::kDevice && reinterpret_cast<uintptr_t>(data) % kAlignmentBytes == 0;
  }

  // Whether the context knows all tensors where they are, the outputs without a buffer in memory of the runner's.
  bool is_placed(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers) const {
    if (placed_.empty()) return false;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!placed_[i].has(inputs[i])) return false;
    }
    for (size_t i = 0; i < buffers.size(); ++i) {
      const Place& place = placed_[inputs.size() + i];
      if (buffers[i] == nullptr ? !place.is_own() : !place.has(buffers[i])) return false;
    }
    return true;
  }

  void place_all(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers,
                 std::vector<Output>& outputs) {
    // Whatever throws below, the next run places all.
    std::vector<Place> placed = std::exchange(placed_, {});
    placed.resize(inputs.size() + buffers.size());
    before_.clear();
    after_.clear();
    all_device_ = !inputs.empty();
    for (size_t i = 0; i < inputs.size(); ++i) {
      place(*inputs[i], staged_[i], varies(manifest_.inputs[i]));
      placed[i].keep(inputs[i]);
      all_device_ = all_device_ && inputs[i]->memory == Memory::kDevice;
    }
    const char* unknown = nullptr;
    if (context_->inferShapes(1, &unknown) != 0) {
      throw std::runtime_error(std::string("the shape of ") + (unknown == nullptr ? "a tensor" : unknown) +
                               " is not known");
    }
    const Memory own = all_device_ ? Memory::kDevice : Memory::kHost;
    for (size_t i = 0; i < outputs.size(); ++i) {
      place(outputs[i], buffers[i], own, i);
      placed[inputs.size() + i].keep(buffers[i]);
      all_device_ = all_device_ && outputs[i].memory == Memory::kDevice;
    }
    placed_ = std::move(placed);
  }

  void place(const Input& input, DeviceMemory& staged, bool varying) {
    const char* const name = input.name.c_str();
    const void* data = input.data;
    if (!fits(input.data, input.memory)) {
      const size_t bytes = bytes_of(input.dtype, input.shape);
      void* const copy = staged.of_size(bytes);
      before_.push_back({copy, input.data, bytes, input.memory == Memory::kDevice ? cudaMemcpyDeviceToDevice
                                                                                  : cudaMemcpyHostToDevice});
      data = copy;
    }
    if (varying) accept(context_->setInputShape(name, dims_of(input.shape, input.name)), "the shape of " + input.name);
    accept(context_->setInputTensorAddress(name, data), "the address of " + input.name);
  }

  void place(Output& output, const Buffer* buffer, Memory own, size_t index) {
    output.shape = shape_of(context_->getTensorShape(output.name.c_str()));
    if (std::any_of(output.shape.begin(), output.shape.end(), [](int64_t size) { return size < 0; })) {
      throw std::runtime_error("the shape of " + output.name + " is known after a run alone");
    }
    if (buffer != nullptr && buffer->shape != output.shape) {
      throw std::runtime_error("output " + output.name + " has shape " + text_of(output.shape) + ", and its buffer " +
                               text_of(buffer->shape));
    }
    const size_t bytes = bytes_of(output.dtype, output.shape);
    output.memory = buffer != nullptr ? buffer->memory : own;
    void* place = buffer != nullptr ? buffer->data : nullptr;
    void* data = place;
    if (place == nullptr || !fits(place, output.memory)) data = own_[index].of_size(bytes);
    if (place == nullptr && output.memory == Memory::kDevice) place = data;
    if (place == nullptr) {
      host_[index].resize(bytes);
      place = host_[index].data();
    }
    if (place != data) {
      after_.push_back({place, data, bytes, output.memory == Memory::kDevice ? cudaMemcpyDeviceToDevice
                                                                             : cudaMemcpyDeviceToHost});
    }
    accept(context_->setTensorAddress(output.name.c_str(), data), "the address of " + output.name);
    output.data = place;
  }

  void launch() {
    for (const Copy& copy : before_) {
      check(cudaMemcpyAsync(copy.to, copy.from, copy.bytes, copy.kind, stream_), "a copy of an input");
    }
    accept(context_->enqueueV3(stream_), "the run");
    for (const Copy& copy : after_) {
      check(cudaMemcpyAsync(copy.to, copy.from, copy.bytes, copy.kind, stream_), "a copy of an output");
    }
  }

  void record() {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "a recording's begin");
    try {
      launch();
    } catch (const std::exception&) {
      // The stream is left as it was.
      cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), "a recording's end");
    const cudaError_t made = cudaGraphInstantiateWithFlags(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    check(made, "cudaGraphInstantiate");
  }

  Opened& opened_;
  const Manifest& manifest_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  // For inputs that are elsewhere, or begin in the middle of a word; for outputs likewise, and those without a buffer.
  std::vector<DeviceMemory> staged_, own_;
  std::vector<std::string> host_;
  std::vector<Copy> before_, after_;
  // Inputs, then outputs; empty before a run and after one that failed.
  std::vector<Place> placed_;
  bool all_device_ = false;
  cudaStream_t stream_;
  bool callers_;
  cudaGraphExec_t graph_ = nullptr;
};

class TrtBackend final : public Backend {
 public:
  TrtBackend(const Manifest& manifest, std::unique_ptr<Opened> opened)
      : manifest_(manifest), opened_(std::move(opened)) {}

  const char* name() const override { return "TensorRT"; }
  bool on_gpu() const override { return true; }
  std::unique_ptr<Runner> make_runner(void* stream) const override {
    return std::make_unique<TrtRunner>(*opened_, manifest_, stream);
  }

 private:
  const Manifest& manifest_;
  std::unique_ptr<Opened> opened_;
};

// The release that is loaded, as far as it says so: before 10 without its fourth number.
std::string loaded_version() {
#if NV_TENSORRT_MAJOR >= 10
  const std::vector<std::string> numbers = {
      std::to_string(getInferLibMajorVersion()), std::to_string(getInferLibMinorVersion()),
      std::to_string(getInferLibPatchVersion()), std::to_string(getInferLibBuildVersion())};
#else
  const int version = getInferLibVersion();
  const std::vector<std::string> numbers = {std::to_string(version / 1000), std::to_string(version / 100 % 10),
                                            std::to_string(version % 100)};
#endif
  return joined(numbers, ".");
}

void check_version(const Manifest& manifest, const std::string& version, const std::string& folder) {
  const bool told_in_part = manifest.runtime_minimum.rfind(version + ".", 0) == 0;
  if (runs_on(manifest, version) || told_in_part) return;
  throw Error(ErrorKind::kRuntimeUnavailable, "tensorrt opens only engines that it built itself",
              {"tensorrt " + manifest.runtime_version, "tensorrt " + version, folder,
               "let the program load a library of this version, or build the engine again"});
}

int find_gpu(const Manifest& manifest, int device, const std::string& folder) {
  const auto target = manifest.target.find(kCapability);
  const std::string built_for = target == manifest.target.end() ? "?" : target->second;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    throw Error(ErrorKind::kRuntimeUnavailable, "there is no GPU to run the engine on",
                {"an NVIDIA GPU of compute capability " + built_for,
                 error == cudaSuccess ? "none" : cudaGetErrorString(error), folder, ""});
  }
  if (device >= count) {
    throw Error(ErrorKind::kRuntimeUnavailable, "there is no such GPU",
                {"cuda:" + std::to_string(device), std::to_string(count) + " GPUs", folder, ""});
  }
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  const std::string found = std::to_string(major) + "." + std::to_string(minor);
  if (found != built_for) {
    throw Error(ErrorKind::kRuntimeUnavailable, "the engine was built for another GPU",
                {"compute capability " + built_for,
                 "compute capability " + found + ", cuda:" + std::to_string(device), folder,
                 "build the engine again on this machine"});
  }
  return device;
}

// A library registers its plugins while it is loaded, by calls whose layout differs between major releases. So what it
// is for is read from its bytes first.
void check_plugins(const std::string& content, const std::string& version, const std::string& where) {
  static const std::string begin = "modcompile TensorRT plugins: version ";
  static const std::regex form(R"(([\w.+-]+), plugins (\w+), TensorRT (\d+)\.(\d+);)");
  const size_t at = content.find(begin);
  std::smatch parts;
  const std::string signature = at == std::string::npos ? "" : content.substr(at + begin.size(), 200);
  if (!std::regex_search(signature, parts, form, std::regex_constants::match_continuous)) {
    throw Error(ErrorKind::kRuntimeUnavailable, "the library is not modcompile's plugin library",
                {kLibrary, std::to_string(content.size()) + " bytes without its signature", where, kPlugins.fix});
  }
  if (parts[2] != kPluginVersion) {
    throw Error(ErrorKind::kRuntimeUnavailable, "the plugin library has another version of the plugins",
                {std::string("version ") + kPluginVersion,
                 "version " + parts[2].str() + ", of modcompile " + parts[1].str(), where, kPlugins.fix});
  }
  const std::string built_for = parts[3].str() + "." + parts[4].str(), major = version.substr(0, version.find('.'));
  // A library knows the interfaces of older releases of its major version, not those of later ones.
  if (parts[3] != major || !is_at_most(built_for, version)) {
    throw Error(ErrorKind::kRuntimeUnavailable, "the plugin library is for another TensorRT",
                {"TensorRT " + major + ", " + version + " or older", "TensorRT " + built_for, where, kPlugins.fix});
  }
}

void open_plugins(const std::string& folder, const Manifest& manifest, const std::string& version) {
  const std::string where = folder + "/" + kLibrary, content = read_verified(folder, manifest, kLibrary);
  check_plugins(content, version, where);
  // Plugins look for TensorRT's registry among global symbols.
  Dl_info tensorrt{};
  if (dladdr(reinterpret_cast<void*>(&getInferLibVersion), &tensorrt) != 0) {
    dlopen(tensorrt.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
  }
  open_library(content, manifest.files.at(kLibrary).sha256, kPlugins, where);
}

// Name, then what it is: whether it is an input, its type's number, and for inputs the sizes.
using Interface = std::map<std::string, std::string>;

std::string described(bool is_input, int type, const std::vector<int64_t>& shape) {
  return (is_input ? "input of type " : "output of type ") + std::to_string(type) +
         (is_input ? " " + text_of(shape) : "");
}

void check_interface(const nvinfer1::ICudaEngine& engine, const Manifest& manifest, const std::string& path) {
  Interface found, expected;
  for (int i = 0; i < engine.getNbIOTensors(); ++i) {
    const char* const name = engine.getIOTensorName(i);
    const bool is_input = engine.getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
    // An output's sizes are what could be inferred, and more may be known of the engine than of the network.
    found[name] = described(is_input, static_cast<int>(engine.getTensorDataType(name)),
                            shape_of(engine.getTensorShape(name)));
  }
  for (const auto* specs : {&manifest.inputs, &manifest.outputs}) {
    for (const TensorSpec& spec : *specs) {
      std::vector<int64_t> shape;
      for (const Dim& dim : spec.shape) shape.push_back(dim.symbol.empty() ? dim.size : -1);
      expected[spec.name] = described(specs == &manifest.inputs, kTypes[static_cast<size_t>(spec.dtype)], shape);
    }
  }
  const auto listed = [](const Interface& tensors) {
    std::vector<std::string> texts;
    for (const auto& [name, text] : tensors) texts.push_back(name + ": " + text);
    return joined(texts, "; ");
  };
  if (found != expected) {
    throw Error(ErrorKind::kIntegrity, "the engine's inputs or outputs are not those of its manifest",
                {listed(expected), listed(found), path, "copy the engine folder again, or build the engine again"});
  }
}

}  // namespace

std::unique_ptr<Backend> load_trt(const std::string& folder, const Manifest& manifest, const LoadOptions& options) {
  const std::string version = loaded_version(), path = folder + "/" + manifest.entry;
  check_version(manifest, version, folder);
  auto opened = std::make_unique<Opened>();
  opened->device = find_gpu(manifest, options.device, folder);
  opened->cuda_graph = options.cuda_graph;
  if (manifest.files.count(kLibrary) > 0) open_plugins(folder, manifest, version);
  const OnDevice current(opened->device);
  opened->runtime.reset(nvinfer1::createInferRuntime(opened->log));
  if (opened->runtime == nullptr) {
    throw Error(ErrorKind::kRuntimeUnavailable, "TensorRT does not start",
                {"a library for headers of " + std::to_string(NV_TENSORRT_MAJOR) + "." +
                 std::to_string(NV_TENSORRT_MINOR), "tensorrt " + version + ": " + opened->log.take(), folder, ""});
  }
  const std::string plan = read_verified(folder, manifest, manifest.entry);
  opened->engine.reset(opened->runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (opened->engine == nullptr) {
    throw Error(ErrorKind::kRuntimeUnavailable, "tensorrt does not open the engine",
                {"an engine for this GPU", opened->log.take(), folder, "build the engine again on this machine"});
  }
  check_interface(*opened->engine, manifest, path);
  return std::make_unique<TrtBackend>(manifest, std::move(opened));
}

}  // namespace modcompile
