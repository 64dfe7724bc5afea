// TensorRT itself, of releases 8.6 to 11: enqueueV3 of a context that knows where its tensors are. Plugins are those
// that the C++ runtime registered when it loaded the engine.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>

#include "bench.h"
#include "words.h"

namespace mc = modcompile;

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

void accept(bool accepted) {
  if (!accepted) throw std::runtime_error("TensorRT refuses a call");
}

struct Silent final : nvinfer1::ILogger {
  void log(Severity, const char*) noexcept override {}
};

class BareTrt final : public Bare {
 public:
  explicit BareTrt(const Task& task) : task_(task), runtime_(nvinfer1::createInferRuntime(log_)) {
    accept(runtime_ != nullptr);
    const std::string plan = read_whole(task.entry());
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    accept(engine_ != nullptr);
    context_.reset(engine_->createExecutionContext());
    accept(context_ != nullptr);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  BareTrt(const BareTrt&) = delete;
  BareTrt& operator=(const BareTrt&) = delete;
  ~BareTrt() override {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    cudaStreamDestroy(stream_);
  }

  void prepare() override {
    const std::vector<mc::TensorSpec>& specs = task_.engine.inputs();
    for (const mc::Input& input : task_.inputs) {
      const auto spec = std::find_if(specs.begin(), specs.end(), [&](const auto& s) { return s.name == input.name; });
      const auto varies = [](const mc::Dim& dim) { return !dim.symbol.empty(); };
      if (std::any_of(spec->shape.begin(), spec->shape.end(), varies)) {
        nvinfer1::Dims dims{};
        for (const int64_t size : input.shape) {
          dims.d[dims.nbDims++] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(size);
        }
        accept(context_->setInputShape(input.name.c_str(), dims));
      }
      accept(context_->setInputTensorAddress(input.name.c_str(), input.data));
    }
    for (const mc::Buffer& buffer : task_.buffers) accept(context_->setTensorAddress(buffer.name.c_str(), buffer.data));
  }

  void run() override {
    if (graph_ != nullptr) {
      check(cudaGraphLaunch(graph_, stream_));
    } else {
      accept(context_->enqueueV3(stream_));
    }
    check(cudaStreamSynchronize(stream_));
    if (task_.is_graph && graph_ == nullptr) record();
  }

 private:
  void record() {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    accept(context_->enqueueV3(stream_));
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiateWithFlags(&graph_, graph, 0));
    check(cudaGraphDestroy(graph));
  }

  const Task& task_;
  Silent log_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace

std::unique_ptr<Bare> open_trt(const Task& task, std::string& version) {
  version = task.engine.manifest().runtime_version;
  return std::make_unique<BareTrt>(task);
}
