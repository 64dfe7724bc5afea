// Stands in for libnvinfer and for CUDA's runtime, on the CPU, to drive runtimes/native/runtime/trt.cc through
// TensorRT's own headers. Preloaded, it takes the place of both. "Device memory" is the host's, a stream does at once
// what it is given, and while a stream is captured it does nothing but take notes, which a graph's launch reads out.
//
// A plan is words: "static" or "varying", then "plugins" for an engine that needs the plugin library. The engine has
// input x [B, 5] in float32, B at most 8, and output y = 2 x, whose bytes are uint8 [B, 5, 4].
//
// stubs.h overrides each pure method of the headers with one that aborts: what is called is what is written here.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "stubs.h"

namespace {

using nvinfer1::Dims;

constexpr int kWidth = 5, kLargest = 8, kStaticBatch = 3;

// What a stream was told while it is captured.
std::mutex turn;
std::map<cudaStream_t, std::vector<std::function<void()>>> captured;
bool plugins_are_there = false;

bool take_note(cudaStream_t stream, const std::function<void()>& work) {
  const std::lock_guard<std::mutex> lock(turn);
  const auto notes = captured.find(stream);
  if (notes == captured.end()) return false;
  notes->second.push_back(work);
  return true;
}

void on_stream(cudaStream_t stream, const std::function<void()>& work) {
  if (!take_note(stream, work)) work();
}

Dims dims_of(std::initializer_list<int> sizes) {
  Dims dims{};
  for (const int size : sizes) dims.d[dims.nbDims++] = size;
  return dims;
}

class Context final : public nvinfer1::IExecutionContext, public VExecutionContextStub {
 public:
  explicit Context(bool varies) : varies_(varies), batch_(varies ? -1 : kStaticBatch) { mImpl = this; }
  nvinfer1::IExecutionContext* getPImpl() noexcept override { return this; }

  bool setInputShape(const char* name, const Dims& dims) noexcept override {
    if (!varies_ || std::strcmp(name, "x") != 0 || dims.nbDims != 2 || dims.d[1] != kWidth || dims.d[0] > kLargest) {
      return false;
    }
    batch_ = static_cast<int>(dims.d[0]);
    return true;
  }
  int32_t inferShapes(int32_t, const char** names) noexcept override {
    if (batch_ < 0) *names = "x";
    return batch_ < 0 ? 1 : 0;
  }
  Dims getTensorShape(const char* name) const noexcept override {
    return std::strcmp(name, "y") == 0 ? dims_of({batch_, kWidth, 4}) : dims_of({batch_, kWidth});
  }
  bool setInputTensorAddress(const char* name, const void* data) noexcept override {
    x_ = static_cast<const float*>(data);
    return std::strcmp(name, "x") == 0 && aligned(data);
  }
  bool setTensorAddress(const char* name, void* data) noexcept override {
    y_ = data;
    return std::strcmp(name, "y") == 0 && aligned(data);
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    on_stream(stream, [batch = batch_, x = x_, y = y_] {
      for (int i = 0; i < batch * kWidth; ++i) {
        const float twice = 2 * x[i];
        std::memcpy(static_cast<char*>(y) + 4 * i, &twice, 4);
      }
    });
    return true;
  }

 private:
  // What the back end promises TensorRT.
  static bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 256 == 0; }

  bool varies_;
  int batch_;
  const float* x_ = nullptr;
  void* y_ = nullptr;
};

class Engine final : public nvinfer1::ICudaEngine, public VCudaEngineStub {
 public:
  explicit Engine(bool varies) : varies_(varies) { mImpl = this; }
  nvinfer1::ICudaEngine* getPImpl() noexcept override { return this; }
#if NV_TENSORRT_MAJOR >= 10
  nvinfer1::IExecutionContext* createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy) noexcept override {
#else
  nvinfer1::IExecutionContext* createExecutionContext() noexcept override {
#endif
    return new Context(varies_);
  }
  int32_t getNbIOTensors() const noexcept override { return 2; }
  const char* getIOTensorName(int32_t index) const noexcept override { return index == 0 ? "x" : "y"; }
  nvinfer1::TensorIOMode getTensorIOMode(const char* name) const noexcept override {
    return *name == 'x' ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
  }
  nvinfer1::DataType getTensorDataType(const char* name) const noexcept override {
    return *name == 'x' ? nvinfer1::DataType::kFLOAT : nvinfer1::DataType::kUINT8;
  }
  Dims getTensorShape(const char* name) const noexcept override {
    const int batch = varies_ ? -1 : kStaticBatch;
    return *name == 'y' ? dims_of({batch, kWidth, 4}) : dims_of({batch, kWidth});
  }

 private:
  bool varies_;
};

class Runtime final : public nvinfer1::IRuntime, public VRuntimeStub {
 public:
  explicit Runtime(nvinfer1::ILogger& logger) : logger_(logger) { mImpl = this; }
  nvinfer1::IRuntime* getPImpl() noexcept override { return this; }
#if NV_TENSORRT_MAJOR >= 10
  nvinfer1::ICudaEngine* deserializeCudaEngine(const void* data, size_t size) noexcept override {
#else
  nvinfer1::ICudaEngine* deserializeCudaEngine(const void* data, size_t size,
                                               nvinfer1::IPluginFactory*) noexcept override {
#endif
    const std::string plan(static_cast<const char*>(data), size);
    if (plan.find("plugins") != std::string::npos && !plugins_are_there) {
      logger_.log(nvinfer1::ILogger::Severity::kERROR, "no creator of the plugin Route");
      return nullptr;
    }
    if (plan.rfind("static", 0) != 0 && plan.rfind("varying", 0) != 0) {
      logger_.log(nvinfer1::ILogger::Severity::kWARNING, "what is only a warning");
      logger_.log(nvinfer1::ILogger::Severity::kERROR, "magic tag does not match");
      return nullptr;
    }
    return new Engine(plan.rfind("varying", 0) == 0);
  }

 private:
  nvinfer1::ILogger& logger_;
};

}  // namespace

// The plugin library of the tests calls it while it is loaded.
extern "C" __attribute__((visibility("default"))) void fake_tensorrt_register() { plugins_are_there = true; }

#pragma GCC visibility push(default)

extern "C" {

void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  if (version / 100 != NV_TENSORRT_VERSION / 100) return nullptr;
  return static_cast<nvinfer1::IRuntime*>(new Runtime(*static_cast<nvinfer1::ILogger*>(logger)));
}
int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }
int32_t getInferLibBuildVersion() noexcept { return NV_TENSORRT_BUILD; }

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0, cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in"; }
cudaError_t cudaMalloc(void** data, size_t size) {
  *data = std::aligned_alloc(256, (size + 255) / 256 * 256);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* data) { return std::free(data), cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return on_stream(stream, [=] { std::memcpy(to, from, size); }), cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  return std::memcpy(to, from, size), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = reinterpret_cast<cudaStream_t>(new char), cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete reinterpret_cast<char*>(stream), cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  // As CUDA, which would end the capture with an error.
  const std::lock_guard<std::mutex> lock(turn);
  return captured.count(stream) == 0 ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const std::lock_guard<std::mutex> lock(turn);
  return captured[stream].clear(), cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const std::lock_guard<std::mutex> lock(turn);
  *graph = reinterpret_cast<cudaGraph_t>(new std::vector<std::function<void()>>(captured[stream]));
  return captured.erase(stream), cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long) {
  *ready = reinterpret_cast<cudaGraphExec_t>(
      new std::vector<std::function<void()>>(*reinterpret_cast<std::vector<std::function<void()>>*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  for (const auto& work : *reinterpret_cast<std::vector<std::function<void()>>*>(graph)) work();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return delete reinterpret_cast<std::vector<std::function<void()>>*>(graph), cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return delete reinterpret_cast<std::vector<std::function<void()>>*>(graph), cudaSuccess;
}

}  // extern "C"
