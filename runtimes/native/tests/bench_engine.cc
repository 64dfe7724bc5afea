// bench_engine FOLDER RUNS TENSOR...: what a run by the C++ runtime takes over one by ONNX Runtime itself.
//
// Both run the bundle's model with one thread, on the same memory, in turn, ONNX Runtime with everything bound before.
// An engine for CUDA runs on device memory. Prints JSON, in microseconds: medians, and the median of the differences of
// neighbours, which what else the machine does moves least.

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

int bench(int count, char** arguments) {
  const Words words(arguments, arguments + count);
  const Tensors tensors(words, 3);
  mc::LoadOptions load;
  load.intra_op_threads = 1;
  const mc::Engine engine = mc::Engine::load(words.at(1), load);
  const auto& providers = engine.manifest().providers;
  const bool on_gpu = std::find(providers.begin(), providers.end(), "CUDAExecutionProvider") != providers.end();
  const mc::Memory where = on_gpu ? mc::Memory::kDevice : mc::Memory::kHost;

  Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "bench");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  if (on_gpu) {
    OrtCUDAProviderOptionsV2* cuda = nullptr;
    Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
    const char *key = "use_tf32", *value = "0";
    Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(cuda, &key, &value, 1));
    options.AppendExecutionProvider_CUDA_V2(*cuda);
    Ort::GetApi().ReleaseCUDAProviderOptions(cuda);
  }
  Ort::Session session(env, (words[1] + "/" + engine.manifest().entry).c_str(), options);
  const Ort::MemoryInfo memory(on_gpu ? "Cuda" : "Cpu", OrtDeviceAllocator, 0, OrtMemTypeDefault);
  Ort::IoBinding binding(session);
  const auto wrap = [&](const auto& tensor, void* data) {
    return Ort::Value::CreateTensor(memory, data, bytes_of(tensor.dtype, tensor.shape), tensor.shape.data(),
                                    tensor.shape.size(), type_of(tensor.dtype));
  };
  std::vector<mc::Input> inputs;
  for (const mc::Input& input : tensors.inputs) {
    void* const data = place(bytes_of(input.dtype, input.shape), input.data, on_gpu);
    inputs.push_back({input.name, input.dtype, input.shape, data, where});
    binding.BindInput(input.name.c_str(), wrap(input, data));
  }
  mc::Context context = engine.make_context();
  std::vector<mc::Buffer> buffers;
  for (const mc::Output& output : context.run(inputs)) {
    void* const data = place(bytes_of(output.dtype, output.shape), nullptr, on_gpu);
    buffers.push_back({output.name, output.dtype, output.shape, data, where});
    binding.BindOutput(output.name.c_str(), wrap(output, data));
  }

  const auto bare = [&] { session.Run(Ort::RunOptions{nullptr}, binding); };
  const auto ours = [&] { context.run(inputs, buffers); };
  std::vector<double> bare_us, ours_us, difference_us;
  for (int run = -10; run < std::stoi(words.at(2)); ++run) {
    // Each goes first as often as the other.
    const bool first = run % 2 == 0;
    double taken[2];
    for (const bool own : {first, !first}) taken[own] = own ? microseconds(ours) : microseconds(bare);
    if (run < 0) continue;
    bare_us.push_back(taken[0]);
    ours_us.push_back(taken[1]);
    difference_us.push_back(taken[1] - taken[0]);
  }
  std::cout << "{\"device\": \"" << (on_gpu ? "cuda" : "cpu") << "\", \"runs\": " << bare_us.size()
            << ", \"onnxruntime_us\": " << median(bare_us) << ", \"modcompile_us\": " << median(ours_us)
            << ", \"difference_us\": " << median(difference_us) << "}\n";
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
