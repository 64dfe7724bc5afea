// AOTInductor itself: the package's loader, on tensors that were made before. Its outputs are its own.

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>
#ifdef MODCOMPILE_TORCH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#endif

#include <optional>
#include <stdexcept>

#include "bench.h"

#ifdef MODCOMPILE_TORCH_CUDA
namespace at::cuda {
// Declared here: its header asks for cuSPARSE's, which a toolkit may lack.
void clearCublasWorkspaces();
}  // namespace at::cuda
#endif

namespace mc = modcompile;

namespace {

at::ScalarType type_of(mc::DType dtype) {
  switch (dtype) {
    case mc::DType::kInt64: return at::kLong;
    case mc::DType::kFloat32: return at::kFloat;
    case mc::DType::kFloat16: return at::kHalf;
    case mc::DType::kBool: return at::kBool;
    default: throw std::runtime_error("bench_engine has no such dtype");
  }
}

class BareAoti final : public Bare {
 public:
  explicit BareAoti(const Task& task)
      : task_(task), device_(task.on_gpu ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU)),
        loader_(task.entry(), "model", true, 1, device_.index()) {}

  void prepare() override {
    const at::InferenceMode no_gradients;
    inputs_.clear();
    for (const mc::Input& input : task_.inputs) {
      inputs_.push_back(at::from_blob(const_cast<void*>(input.data), input.shape,
                                      at::TensorOptions(type_of(input.dtype)).device(device_)));
    }
  }

  void run() override {
    const at::InferenceMode no_gradients;
    if (task_.is_graph) {
      replay();
    } else {
      launch();
    }
    if (!device_.is_cuda()) return;
    const c10::impl::VirtualGuardImpl guard(device_.type());
    guard.synchronizeStream(guard.getStream(device_));
  }

 private:
  void launch() {
    outputs_.clear();
    std::vector<at::Tensor> inputs = inputs_;
    outputs_ = loader_.boxed_run(std::move(inputs));
  }

  void replay() {
#ifdef MODCOMPILE_TORCH_CUDA
    if (!graph_) record();
    graph_->replay();
#endif
  }

#ifdef MODCOMPILE_TORCH_CUDA
  void record() {
    c10::cuda::device_synchronize();
    const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool(false, device_.index());
    const c10::cuda::CUDAStreamGuard on_stream(stream);
    launch();
    stream.synchronize();
    graph_.emplace();
    graph_->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    launch();
    graph_->capture_end();
    // What cuBLAS took while it was recorded is the graph's, and goes with it.
    at::cuda::clearCublasWorkspaces();
  }
#endif

  const Task& task_;
  at::Device device_;
  torch::inductor::AOTIModelPackageLoader loader_;
  std::vector<at::Tensor> inputs_, outputs_;
#ifdef MODCOMPILE_TORCH_CUDA
  // After what it reads and writes, so that it goes first.
  std::optional<at::cuda::CUDAGraph> graph_;
#endif
};

}  // namespace

std::unique_ptr<Bare> open_aoti(const Task& task, std::string& version) {
  version = TORCH_VERSION;
  return std::make_unique<BareAoti>(task);
}
