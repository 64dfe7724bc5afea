// bench_engine FOLDER RUNS TENSOR...: what a run by the C++ runtime takes over one by ONNX Runtime itself.
//
// Both run the bundle's model with one thread, on the same memory, in turn, ONNX Runtime with everything bound before.
// An engine for CUDA runs on device memory, and then also as a CUDA graph. Prints a line of JSON for each, in
// microseconds: medians, and the median of the differences of neighbours, which what else the machine does moves least.
// "noise_us" is such a difference too, of a second session of ONNX Runtime: what a difference of nothing looks like.

#include <onnxruntime_cxx_api.h>
#ifdef WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <chrono>
#include <iostream>
#include <string>
#include <vector>

#include "modcompile/engine.h"
#include "words.h"

namespace mc = modcompile;

namespace {

using Clock = std::chrono::steady_clock;

ONNXTensorElementDataType type_of(mc::DType dtype) {
  switch (dtype) {
    case mc::DType::kInt64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case mc::DType::kFloat32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case mc::DType::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case mc::DType::kBool: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    default: throw std::runtime_error("bench_engine has no such dtype");
  }
}

// Memory for a tensor, with these contents if any: the host's, or a GPU's. It stays.
void* place(size_t bytes, const void* contents, bool on_gpu) {
#ifdef WITH_CUDA
  if (on_gpu) {
    void* data = nullptr;
    if (cudaMalloc(&data, bytes) != cudaSuccess ||
        (contents != nullptr && cudaMemcpy(data, contents, bytes, cudaMemcpyHostToDevice) != cudaSuccess)) {
      throw std::runtime_error("there is no device memory");
    }
    return data;
  }
#endif
  if (on_gpu) throw std::runtime_error("built without CUDA");
  auto* const data = new std::string(bytes, '\0');
  if (contents != nullptr) data->assign(static_cast<const char*>(contents), bytes);
  return data->data();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

template <typename Run>
double microseconds(Run run) {
  const auto start = Clock::now();
  run();
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

// ONNX Runtime itself, with everything bound.
class Bare {
 public:
  Bare(const mc::Engine& engine, const std::string& folder, bool on_gpu, bool is_graph)
      : memory_(on_gpu ? "Cuda" : "Cpu", OrtDeviceAllocator, 0, OrtMemTypeDefault) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    if (on_gpu) {
      OrtCUDAProviderOptionsV2* cuda = nullptr;
      Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
      // As the C++ runtime has them.
      const char *keys[] = {"use_tf32", "arena_extend_strategy", "enable_cuda_graph"};
      const char *values[] = {"0", "kSameAsRequested", is_graph ? "1" : "0"};
      Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(cuda, keys, values, 3));
      options.AppendExecutionProvider_CUDA_V2(*cuda);
      Ort::GetApi().ReleaseCUDAProviderOptions(cuda);
    }
    session_ = Ort::Session(env_, (folder + "/" + engine.manifest().entry).c_str(), options);
    binding_ = Ort::IoBinding(session_);
  }

  void bind(const std::vector<mc::Input>& inputs, const std::vector<mc::Buffer>& buffers) {
    for (const mc::Input& input : inputs) {
      binding_.BindInput(input.name.c_str(), wrap(input, const_cast<void*>(input.data)));
    }
    for (const mc::Buffer& buffer : buffers) binding_.BindOutput(buffer.name.c_str(), wrap(buffer, buffer.data));
  }

  void run() { session_.Run(Ort::RunOptions{nullptr}, binding_); }

 private:
  template <typename Tensor>
  Ort::Value wrap(const Tensor& tensor, void* data) const {
    return Ort::Value::CreateTensor(memory_, data, bytes_of(tensor.dtype, tensor.shape), tensor.shape.data(),
                                    tensor.shape.size(), type_of(tensor.dtype));
  }

  Ort::Env env_{ORT_LOGGING_LEVEL_FATAL, "bench"};
  Ort::MemoryInfo memory_;
  Ort::Session session_{nullptr};
  Ort::IoBinding binding_{nullptr};
};

void measure(const std::string& folder, int runs, const Tensors& tensors, bool on_gpu, bool is_graph) {
  mc::LoadOptions load;
  load.intra_op_threads = 1;
  load.cuda_graph = is_graph;
  const mc::Engine engine = mc::Engine::load(folder, load);
  const mc::Memory where = on_gpu ? mc::Memory::kDevice : mc::Memory::kHost;
  mc::Context context = engine.make_context();
  std::vector<mc::Input> inputs;
  for (const mc::Input& input : tensors.inputs) {
    void* const data = place(bytes_of(input.dtype, input.shape), input.data, on_gpu);
    inputs.push_back({input.name, input.dtype, input.shape, data, where});
  }
  std::vector<mc::Buffer> buffers;
  // A context of its own: the shapes are not known before, and a graph's memory stays what it was.
  mc::Context sizes = engine.make_context();
  for (const mc::Output& output : sizes.run(inputs)) {
    void* const data = place(bytes_of(output.dtype, output.shape), nullptr, on_gpu);
    buffers.push_back({output.name, output.dtype, output.shape, data, where});
  }
  Bare bare(engine, folder, on_gpu, is_graph), again(engine, folder, on_gpu, is_graph);
  bare.bind(inputs, buffers);
  again.bind(inputs, buffers);

  std::vector<double> bare_us, ours_us, difference_us, noise_us;
  for (int run = -30; run < runs; ++run) {
    // Each is first, second and third as often as the others.
    double taken[3];
    for (int turn = 0; turn < 3; ++turn) {
      const int who = (run + 30 + turn) % 3;
      taken[who] = who == 0 ? microseconds([&] { bare.run(); })
                   : who == 1 ? microseconds([&] { again.run(); })
                              : microseconds([&] { context.run(inputs, buffers); });
    }
    if (run < 0) continue;
    bare_us.push_back(taken[0]);
    ours_us.push_back(taken[2]);
    difference_us.push_back(taken[2] - taken[0]);
    noise_us.push_back(taken[1] - taken[0]);
  }
  std::cout << "{\"device\": \"" << (on_gpu ? "cuda" : "cpu") << "\", \"cuda_graph\": " << (is_graph ? "true" : "false")
            << ", \"runs\": " << runs << ", \"onnxruntime_us\": " << median(bare_us)
            << ", \"modcompile_us\": " << median(ours_us) << ", \"difference_us\": " << median(difference_us)
            << ", \"noise_us\": " << median(noise_us) << "}\n";
}

int bench(int count, char** arguments) {
  const Words words(arguments, arguments + count);
  const Tensors tensors(words, 3);
  const std::vector<std::string> providers = mc::Engine::load(words.at(1)).manifest().providers;
  const bool on_gpu = std::find(providers.begin(), providers.end(), "CUDAExecutionProvider") != providers.end();
  const int runs = std::stoi(words.at(2));
  measure(words.at(1), runs, tensors, on_gpu, false);
  if (on_gpu) measure(words.at(1), runs, tensors, on_gpu, true);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return bench(count, arguments);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
