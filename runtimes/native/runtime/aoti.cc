// The back end AOTInductor: a package of machine code, opened and run by torch's C++ library. On a GPU it allocates by
// torch's allocator, for a CUDA graph from a pool that is the graph's.

#include <ATen/ATen.h>
#include <ATen/cpu/Utils.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sys/utsname.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>
#ifdef MODCOMPILE_TORCH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <sstream>
#include <utility>

#include "backend.h"
#include "files.h"
#include "manifest.h"
#include "text.h"

#ifdef MODCOMPILE_TORCH_CUDA
namespace at::cuda {
// Declared here: its header asks for cuSPARSE's, which a toolkit may lack.
void clearCublasWorkspaces();
}  // namespace at::cuda
#endif

namespace modcompile {
namespace {

// In the manifest's target: the largest size of a dim, and how many elements tensors have at most.
constexpr const char* kLargest = "largest ";
constexpr const char* kElements = "elements";
constexpr double kMostElements = std::numeric_limits<int32_t>::max();

// In the order of DType.
constexpr std::array<at::ScalarType, 13> kTypes = {at::kBool,   at::kByte,   at::kChar,   at::kUInt16, at::kShort,
                                                   at::kUInt32, at::kInt,    at::kUInt64, at::kLong,   at::kHalf,
                                                   at::kBFloat16, at::kFloat, at::kDouble};

std::string reason(const std::exception& error) {
  const auto* torch = dynamic_cast<const c10::Error*>(&error);
  return torch == nullptr ? error.what() : torch->what_without_backtrace();
}

// A tensor on the caller's memory.
template <typename Tensor>
at::Tensor wrap(const Tensor& tensor, void* data, const at::Device& device) {
  return at::from_blob(data, tensor.shape, at::TensorOptions(kTypes[static_cast<size_t>(tensor.dtype)])
                                               .device(tensor.memory == Memory::kHost ? at::Device(at::kCPU) : device));
}

// Makes a stream of the caller's torch's current one.
class OnStream {
 public:
  OnStream(const at::Device& device, void* stream) {
#ifdef MODCOMPILE_TORCH_CUDA
    if (device.is_cuda() && stream != nullptr &&
        aoti_torch_create_cuda_stream_guard(stream, device.index(), &guard_) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error("torch does not take the stream");
    }
#else
    static_cast<void>(device), static_cast<void>(stream);
#endif
  }
  OnStream(const OnStream&) = delete;
  OnStream& operator=(const OnStream&) = delete;
#ifdef MODCOMPILE_TORCH_CUDA
  ~OnStream() {
    if (guard_ != nullptr) aoti_torch_delete_cuda_stream_guard(guard_);
  }

 private:
  CUDAStreamGuardHandle guard_ = nullptr;
#endif
};

#ifdef MODCOMPILE_TORCH_CUDA
// Work that was launched once under capture, and is launched as a whole from then on.
class Recorded {
 public:
  Recorded(const at::Device& device, const std::function<void()>& work) {
    // What the work reads must be there: a run that is not recorded comes first, so that libraries load and take memory.
    c10::cuda::device_synchronize();
    const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool(false, device.index());
    const c10::cuda::CUDAStreamGuard on_stream(stream);
    work();
    stream.synchronize();
    graph_.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    try {
      work();
    } catch (...) {
      try {
        graph_.capture_end();
      } catch (const std::exception&) {
        // Of a capture that failed; the reason is the other's.
      }
      throw;
    }
    graph_.capture_end();
    // What cuBLAS took while it was recorded is the graph's, and goes with it.
    at::cuda::clearCublasWorkspaces();
  }

  // On torch's current stream.
  void replay() { graph_.replay(); }

 private:
  at::cuda::CUDAGraph graph_;
};
#endif

// A package that is open, and what its runs share.
struct Package {
  Package(const std::string& path, at::Device where)
      : device(where), loader(path, "model", true, 1, device.is_cuda() ? device.index() : at::DeviceIndex{-1}) {}

  at::Device device;
  // One caller at a time, so that nothing waits for the run before.
  std::mutex turn;
  torch::inductor::AOTIModelPackageLoader loader;
};

class AotiRunner final : public Runner {
 public:
  AotiRunner(Package& package, const Manifest& manifest, void* stream, bool cuda_graph)
      : package_(package), manifest_(manifest), stream_(stream), cuda_graph_(cuda_graph) {}

  void run(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers,
           std::vector<Output>& outputs) override {
    check_sizes(inputs);
    const at::Device device = package_.device;
    try {
      const OnStream stream(device, stream_);
      const at::InferenceMode no_gradients;
      if (cuda_graph_) {
        replay(inputs, buffers, outputs);
      } else {
        launch(inputs, buffers, outputs);
      }
      const auto is_on_device = [](const auto& tensor) { return tensor.memory == Memory::kDevice; };
      const bool all_device = std::all_of(outputs.begin(), outputs.end(), is_on_device) &&
                              std::all_of(inputs.begin(), inputs.end(), [&](const Input* x) { return is_on_device(*x); });
      // What is copied to the host is waited for by the copy.
      if (device.is_cuda() && (stream_ == nullptr || !all_device)) {
        const c10::impl::VirtualGuardImpl guard(device.type());
        guard.synchronizeStream(guard.getStream(device));
      }
    } catch (const std::exception& error) {
      throw std::runtime_error(reason(error));
    }
  }

 private:
  // Launches a run on torch's current stream, and copies what goes to the caller's buffers.
  void launch(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers,
              std::vector<Output>& outputs) {
    const at::Device device = package_.device;
    Memory own = inputs.empty() ? Memory::kHost : Memory::kDevice;
    std::vector<at::Tensor> given;
    given.reserve(inputs.size());
    places_.resize(inputs.size());
    wrapped_.resize(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Input* input = inputs[i];
      if (!places_[i].has(input)) {
        places_[i] = Place();
        wrapped_[i] = wrap(*input, const_cast<void*>(input->data), device);
        places_[i].keep(input);
      }
      given.push_back(wrapped_[i].device() == device ? wrapped_[i] : wrapped_[i].to(device));
      if (input->memory == Memory::kHost) own = Memory::kHost;
    }
    for (Output& output : outputs) output.data = nullptr;
    tensors_.clear();
    {
      const std::lock_guard<std::mutex> turn(package_.turn);
      tensors_ = package_.loader.boxed_run(std::move(given));
    }
    if (tensors_.size() != outputs.size()) throw std::runtime_error("the package gives another number of outputs");
    for (size_t i = 0; i < outputs.size(); ++i) finish(tensors_[i], buffers[i], own, outputs[i]);
  }

  // Records the first run, and gives what the graph writes.
  void replay(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers,
              std::vector<Output>& outputs) {
#ifdef MODCOMPILE_TORCH_CUDA
    if (!recorded_) {
      recorded_.emplace(package_.device, [&] { launch(inputs, buffers, outputs); });
    }
    // The outputs are still those of the recording: where they lie no replay changes.
    recorded_->replay();
#else
    // An engine on the CPU was refused when it was loaded.
    static_cast<void>(inputs), static_cast<void>(buffers), static_cast<void>(outputs);
    throw std::logic_error("this library was built without CUDA");
#endif
  }

  static void finish(at::Tensor& tensor, const Buffer* buffer, Memory own, Output& output) {
    output.shape.assign(tensor.sizes().begin(), tensor.sizes().end());
    if (tensor.scalar_type() != kTypes[static_cast<size_t>(output.dtype)]) {
      throw std::runtime_error("output " + output.name + " has another dtype");
    }
    if (buffer != nullptr) {
      if (buffer->shape != output.shape) {
        throw std::runtime_error("output " + output.name + " has shape " + text_of(output.shape) +
                                 ", and its buffer " + text_of(buffer->shape));
      }
      wrap(*buffer, buffer->data, tensor.device()).copy_(tensor);
      output.data = buffer->data;
      output.memory = buffer->memory;
      return;
    }
    tensor = own == Memory::kHost ? tensor.cpu().contiguous() : tensor.contiguous();
    output.data = tensor.const_data_ptr();
    output.memory = own;
  }

  // Compares the sizes that may vary with what the compiler allowed for, unless they are those of the last run.
  void check_sizes(const std::vector<const Input*>& inputs) {
    const auto same = [](const Input* input, const std::vector<int64_t>& shape) { return input->shape == shape; };
    if (std::equal(inputs.begin(), inputs.end(), shapes_.begin(), shapes_.end(), same)) return;
    shapes_.clear();
    compare_sizes(inputs);
    for (const Input* input : inputs) shapes_.push_back(input->shape);
  }

  void compare_sizes(const std::vector<const Input*>& inputs) const {
    std::map<std::string, int64_t> sizes;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const TensorSpec& spec = manifest_.inputs[i];
      for (size_t axis = 0; axis < spec.shape.size(); ++axis) {
        const std::string& symbol = spec.shape[axis].symbol;
        if (symbol.empty()) continue;
        const int64_t size = sizes[symbol] = inputs[i]->shape[axis];
        const auto largest = manifest_.target.find(kLargest + symbol);
        if (largest != manifest_.target.end() && size > std::stoll(largest->second)) {
          throw Error(ErrorKind::kUsage, "input " + spec.name + " is larger than the engine was compiled for",
                      {symbol + " <= " + largest->second, symbol + " = " + std::to_string(size),
                       spec.name + ", axis " + std::to_string(axis),
                       "build the engine for " + std::to_string(size) + " rows"});
        }
      }
    }
    const auto elements = manifest_.target.find(kElements);
    if (elements == manifest_.target.end()) return;
    std::istringstream products(elements->second);
    for (std::string product; std::getline(products, product, ',');) {
      double count = 1;
      std::istringstream factors(product);
      for (std::string factor; factors >> factor;) {
        const auto size = sizes.find(factor);
        count *= size != sizes.end() ? static_cast<double>(size->second) : std::stod(factor);
      }
      if (count > kMostElements) {
        throw Error(ErrorKind::kUsage, "the inputs are larger than the engine's 32-bit indices reach",
                    {product + " <= 2147483647", "", "",
                     "run fewer or shorter sequences at a time, or build the engine with shapes={...}"});
      }
    }
  }

  Package& package_;
  const Manifest& manifest_;
  void* stream_;
  bool cuda_graph_;
  // Of inputs that passed check_sizes.
  std::vector<std::vector<int64_t>> shapes_;
  // The caller's inputs as tensors, and where they lie.
  std::vector<at::Tensor> wrapped_;
  std::vector<Place> places_;
  // The memory of outputs without a buffer.
  std::vector<at::Tensor> tensors_;
#ifdef MODCOMPILE_TORCH_CUDA
  // After what it reads and writes, so that it goes first.
  std::optional<Recorded> recorded_;
#endif
};

class AotiBackend final : public Backend {
 public:
  AotiBackend(const Manifest& manifest, std::unique_ptr<Package> package, bool cuda_graph)
      : manifest_(manifest), package_(std::move(package)), cuda_graph_(cuda_graph) {}

  const char* name() const override { return "AOTInductor"; }
  bool on_gpu() const override { return package_->device.is_cuda(); }
  std::unique_ptr<Runner> make_runner(void* stream) const override {
    return std::make_unique<AotiRunner>(*package_, manifest_, stream, cuda_graph_);
  }

 private:
  const Manifest& manifest_;
  std::unique_ptr<Package> package_;
  bool cuda_graph_;
};

Error unfit(const char* what, const std::string& expected, const std::string& found, const std::string& folder) {
  return {ErrorKind::kRuntimeUnavailable,
          std::string("the engine was compiled for another machine: ") + what + " differs",
          {expected, found, folder, "build the engine again on this machine"}};
}

std::string of_target(const Manifest& manifest, const char* key) {
  const auto found = manifest.target.find(key);
  return found == manifest.target.end() ? "" : found->second;
}

// Compares what a package was compiled for with what is here. A GPU's architecture is compared by CUDA, which finds no
// kernels for another one.
at::Device check_target(const Manifest& manifest, const LoadOptions& options, const std::string& folder) {
  const std::string kind = of_target(manifest, "device");
  if (kind != "cuda") refuse_gpu_options(options, kind);
  utsname machine{};
  uname(&machine);
  const std::string platform = std::string("linux ") + machine.machine;
  if (of_target(manifest, "platform") != platform) {
    throw unfit("the operating system and processor", of_target(manifest, "platform"), platform, folder);
  }
  const auto capabilities = at::cpu::get_cpu_capabilities();
  std::vector<std::string> missing;
  std::istringstream features(of_target(manifest, "cpu_features"));
  for (std::string feature; features >> feature;) {
    const auto has = capabilities.find(feature);
    if (has == capabilities.end() || !has->second.isBool() || !has->second.toBool()) missing.push_back(feature);
  }
  if (!missing.empty()) {
    throw unfit("the processor's instructions", joined(missing), "a processor without them", folder);
  }
  if (kind != "cuda") return at::kCPU;
  if (!c10::impl::hasDeviceGuardImpl(at::kCUDA)) {
    throw Error(ErrorKind::kRuntimeUnavailable, "this torch has no CUDA", {"torch for CUDA", TORCH_VERSION, folder, ""});
  }
  const int count = c10::impl::VirtualGuardImpl(at::kCUDA).deviceCount();
  if (options.device >= count) {
    throw Error(ErrorKind::kRuntimeUnavailable, "there is no such GPU",
                {"cuda:" + std::to_string(options.device), std::to_string(count) + " GPUs that torch sees", folder, ""});
  }
  return {at::kCUDA, static_cast<at::DeviceIndex>(options.device)};
}

}  // namespace

std::unique_ptr<Backend> load_aoti(const std::string& folder, const Manifest& manifest, const LoadOptions& options) {
  if (!runs_on(manifest, TORCH_VERSION)) {
    throw Error(ErrorKind::kRuntimeUnavailable,
                "AOTInductor packages are bound to the release of torch that compiled them",
                {"torch>=" + manifest.runtime_minimum +
                     (manifest.runtime_below.empty() ? "" : ",<" + manifest.runtime_below),
                 std::string("torch ") + TORCH_VERSION, folder, "let the program load a library of this version"});
  }
  const at::Device device = check_target(manifest, options, folder);
  try {
    const PrivateCopy copy(read_verified(folder, manifest, manifest.entry), "model.pt2");
    return std::make_unique<AotiBackend>(manifest, std::make_unique<Package>(copy.path(), device), options.cuda_graph);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(ErrorKind::kRuntimeUnavailable, "torch does not open the package",
                {"", reason(error), folder, "see the message; build the engine again on this machine"});
  }
}

}  // namespace modcompile
