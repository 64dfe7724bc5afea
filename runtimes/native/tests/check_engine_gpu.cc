// check_engine_gpu FOLDER TARGET RUNS TENSOR...: an engine on a GPU, by every way that memory and streams reach it.
//
// A TENSOR is as words.h has it; each input is given twice, and the first and the second ones are two batches. What the
// engine computes from host memory is written to TARGET/NAME and compared, bit for bit, with what it computes from
// device memory, on a stream of the caller's, on several threads, and as a CUDA graph. Prints a line for each.

#include <cuda_runtime_api.h>

#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "modcompile/engine.h"
#include "words.h"

namespace mc = modcompile;

namespace {

// An output's bytes by name.
using Results = std::map<std::string, std::string>;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("FAILED: " + what);
}

std::string bytes_on_host(const mc::Output& output) {
  std::string bytes(bytes_of(output.dtype, output.shape), '\0');
  check(cudaMemcpy(bytes.data(), output.data, bytes.size(), cudaMemcpyDefault));
  return bytes;
}

Results results_of(const std::vector<mc::Output>& outputs) {
  Results results;
  for (const mc::Output& output : outputs) results[output.name] = bytes_on_host(output);
  return results;
}

// Tensors in device memory, of the shapes of others.
template <typename Tensor>
class OnDevice {
 public:
  template <typename Given>
  explicit OnDevice(const std::vector<Given>& given) {
    for (const Given& tensor : given) {
      void* data = nullptr;
      check(cudaMalloc(&data, bytes_of(tensor.dtype, tensor.shape)));
      tensors.push_back({tensor.name, tensor.dtype, tensor.shape, data, mc::Memory::kDevice});
      memory_.push_back(data);
    }
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    for (void* data : memory_) cudaFree(data);
  }

  void fill(const std::vector<mc::Input>& from, cudaStream_t stream) {
    for (size_t i = 0; i < memory_.size(); ++i) {
      check(cudaMemcpyAsync(memory_[i], from[i].data, bytes_of(from[i].dtype, from[i].shape), cudaMemcpyHostToDevice,
                            stream));
    }
  }

  std::vector<Tensor> tensors;

 private:
  std::vector<void*> memory_;
};

struct Stream {
  Stream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(handle); }
  cudaStream_t handle = nullptr;
};

// Throws unless a call fails for this reason.
template <typename Call>
void refused(const std::string& problem, Call call) {
  try {
    call();
  } catch (const mc::Error& error) {
    require(error.problem() == problem, "refused for another reason: " + error.problem());
    return;
  }
  require(false, "not refused: " + problem);
}

struct Case {
  std::string folder;
  int runs;
  // Two batches in host memory, and what they give there.
  std::vector<mc::Input> inputs[2];
  Results expected[2];
  std::vector<mc::Output> shapes;
};

void from_device_memory(const Case& given) {
  const mc::Engine engine = mc::Engine::load(given.folder);
  mc::Context context = engine.make_context();
  OnDevice<mc::Input> inputs(given.inputs[0]);
  OnDevice<mc::Buffer> buffers(given.shapes);
  for (int batch : {0, 1, 0}) {
    inputs.fill(given.inputs[batch], nullptr);
    check(cudaDeviceSynchronize());
    for (const mc::Output& output : context.run(inputs.tensors)) {
      require(output.memory == mc::Memory::kDevice, "outputs lie where the inputs do");
      require(bytes_on_host(output) == given.expected[batch].at(output.name), "device memory, " + output.name);
    }
    require(results_of(context.run(inputs.tensors, buffers.tensors)) == given.expected[batch], "device buffers");
    require(results_of(context.run(given.inputs[batch], buffers.tensors)) == given.expected[batch], "host to device");
    require(results_of(context.run(given.inputs[batch])) == given.expected[batch], "host to host");
  }
  std::cout << "device memory: ok\n";
}

// Runs that are not waited for: the stream alone keeps them in order.
void on_a_stream(const Case& given) {
  Stream stream;
  mc::LoadOptions options;
  options.stream = stream.handle;
  const mc::Engine engine = mc::Engine::load(given.folder, options);
  mc::Context context = engine.make_context();
  OnDevice<mc::Input> inputs(given.inputs[0]);
  OnDevice<mc::Buffer> buffers(given.shapes);
  std::vector<std::vector<std::string>> copies(static_cast<size_t>(given.runs));
  for (size_t run = 0; run < copies.size(); ++run) {
    inputs.fill(given.inputs[run % 2], stream.handle);
    const auto& outputs = context.run(inputs.tensors, buffers.tensors);
    for (const mc::Output& output : outputs) {
      std::string& copy = copies[run].emplace_back(bytes_of(output.dtype, output.shape), '\0');
      check(cudaMemcpyAsync(copy.data(), output.data, copy.size(), cudaMemcpyDeviceToHost, stream.handle));
    }
  }
  check(cudaStreamSynchronize(stream.handle));
  for (size_t run = 0; run < copies.size(); ++run) {
    for (size_t i = 0; i < given.shapes.size(); ++i) {
      require(copies[run][i] == given.expected[run % 2].at(given.shapes[i].name), "on a stream, " +
              given.shapes[i].name);
    }
  }
  std::cout << "a stream: ok\n";
}

void on_threads(const Case& given) {
  const mc::Engine engine = mc::Engine::load(given.folder);
  std::vector<std::string> problems(8);
  std::vector<std::thread> threads;
  for (std::string& problem : problems) {
    threads.emplace_back([&] {
      try {
        // ONNX Runtime has one stream an engine.
        Stream stream;
        mc::Context context = engine.make_context(engine.manifest().runtime == "ort" ? nullptr : stream.handle);
        OnDevice<mc::Input> inputs(given.inputs[0]);
        for (int run = 0; run < given.runs; ++run) {
          inputs.fill(given.inputs[run % 2], stream.handle);
          check(cudaStreamSynchronize(stream.handle));
          const auto& outputs = context.run(inputs.tensors);
          check(cudaStreamSynchronize(stream.handle));
          require(results_of(outputs) == given.expected[run % 2], "on threads");
        }
      } catch (const std::exception& error) {
        problem = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& problem : problems) require(problem.empty(), problem);
  std::cout << "8 threads: ok\n";
}

void as_a_graph(const Case& given, bool with_stream) {
  Stream stream;
  mc::LoadOptions options;
  options.stream = with_stream ? stream.handle : nullptr;
  options.cuda_graph = true;
  const mc::Engine engine = mc::Engine::load(given.folder, options);
  mc::Context context = engine.make_context(), other = engine.make_context();
  OnDevice<mc::Input> inputs(given.inputs[0]), others(given.inputs[0]);
  OnDevice<mc::Buffer> buffers(given.shapes);
  for (int run = 0; run < given.runs; ++run) {
    inputs.fill(given.inputs[run % 2], stream.handle);
    others.fill(given.inputs[1 - run % 2], stream.handle);
    check(cudaStreamSynchronize(stream.handle));
    const auto& outputs = context.run(inputs.tensors, buffers.tensors);
    check(cudaStreamSynchronize(stream.handle));
    require(results_of(outputs) == given.expected[run % 2], "a graph's replay");
    // A second context, whose outputs are its own.
    const auto& own = other.run(others.tensors);
    check(cudaStreamSynchronize(stream.handle));
    require(results_of(own) == given.expected[1 - run % 2], "a second graph's replay");
  }
  refused("a CUDA graph reads and writes the memory that it was recorded with",
          [&] { context.run(others.tensors, buffers.tensors); });
  refused("a CUDA graph takes device memory", [&] { context.run(given.inputs[0], buffers.tensors); });
  std::cout << "a CUDA graph" << (with_stream ? " on a stream" : "") << ": ok\n";
}

int run(int count, char** arguments) {
  const Words words(arguments, arguments + count);
  const Tensors tensors(words, 4);
  Case given{words.at(1), std::stoi(words.at(3)), {}, {}, {}};
  const size_t half = tensors.inputs.size() / 2;
  for (size_t i = 0; i < tensors.inputs.size(); ++i) given.inputs[i / half].push_back(tensors.inputs[i]);
  const mc::Engine engine = mc::Engine::load(given.folder);
  mc::Context context = engine.make_context();
  for (size_t batch : {size_t{0}, size_t{1}}) given.expected[batch] = results_of(context.run(given.inputs[batch]));
  given.shapes = context.run(given.inputs[0]);
  require(given.expected[0] != given.expected[1], "the two batches give the same");
  for (const auto& [name, bytes] : given.expected[0]) {
    std::ofstream(words[2] + "/" + name, std::ios::binary) << bytes;
  }

  from_device_memory(given);
  on_a_stream(given);
  on_threads(given);
  as_a_graph(given, false);
  as_a_graph(given, true);
  mc::LoadOptions options;
  options.device = 99;
  try {
    mc::Engine::load(given.folder, options);
    require(false, "GPU 99 is there");
  } catch (const mc::Error& error) {
    require(error.kind() == mc::ErrorKind::kRuntimeUnavailable, error.what());
  }
  std::cout << "all checks passed\n";
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run(count, arguments);
  } catch (const std::exception& error) {
    std::cout << error.what() << "\n";
    return 1;
  }
}
