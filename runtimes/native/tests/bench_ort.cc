// ONNX Runtime itself, with everything bound.

#include <onnxruntime_cxx_api.h>

#include <stdexcept>

#include "bench.h"
#include "words.h"

namespace mc = modcompile;

namespace {

ONNXTensorElementDataType type_of(mc::DType dtype) {
  switch (dtype) {
    case mc::DType::kInt64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case mc::DType::kFloat32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case mc::DType::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case mc::DType::kBool: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    default: throw std::runtime_error("bench_engine has no such dtype");
  }
}

class BareOrt final : public Bare {
 public:
  explicit BareOrt(const Task& task)
      : task_(task), memory_(task.on_gpu ? "Cuda" : "Cpu", OrtDeviceAllocator, 0, OrtMemTypeDefault) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    if (task.on_gpu) {
      OrtCUDAProviderOptionsV2* cuda = nullptr;
      Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
      const char *keys[] = {"use_tf32", "arena_extend_strategy", "enable_cuda_graph"};
      const char *values[] = {"0", "kSameAsRequested", task.is_graph ? "1" : "0"};
      Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(cuda, keys, values, 3));
      options.AppendExecutionProvider_CUDA_V2(*cuda);
      Ort::GetApi().ReleaseCUDAProviderOptions(cuda);
    }
    session_ = Ort::Session(env_, task.entry().c_str(), options);
    binding_ = Ort::IoBinding(session_);
  }

  void prepare() override {
    for (const mc::Input& input : task_.inputs) {
      binding_.BindInput(input.name.c_str(), wrap(input, const_cast<void*>(input.data)));
    }
    for (const mc::Buffer& buffer : task_.buffers) binding_.BindOutput(buffer.name.c_str(), wrap(buffer, buffer.data));
  }

  void run() override { session_.Run(Ort::RunOptions{nullptr}, binding_); }

 private:
  template <typename Tensor>
  Ort::Value wrap(const Tensor& tensor, void* data) const {
    return Ort::Value::CreateTensor(memory_, data, bytes_of(tensor.dtype, tensor.shape), tensor.shape.data(),
                                    tensor.shape.size(), type_of(tensor.dtype));
  }

  const Task& task_;
  Ort::Env env_{ORT_LOGGING_LEVEL_FATAL, "bench"};
  Ort::MemoryInfo memory_;
  Ort::Session session_{nullptr};
  Ort::IoBinding binding_{nullptr};
};

}  // namespace

std::unique_ptr<Bare> open_ort(const Task& task, std::string& version) {
  version = Ort::GetVersionString();
  return std::make_unique<BareOrt>(task);
}
