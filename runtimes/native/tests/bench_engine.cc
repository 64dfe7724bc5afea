// bench_engine FOLDER RUNS TENSOR...: what a run by the C++ runtime takes over one by the engine's back end itself.
//
// Both run the bundle's model on the same memory, in turn, the back end with everything prepared before; ONNX Runtime
// with one thread. An engine for a GPU runs on device memory, and where its sizes are static then also as a CUDA graph.
// Prints a line of JSON for each, in microseconds: medians, and the median of the differences of neighbours, which what
// else the machine does moves least. "noise_us" is such a difference too, of the back end opened a second time: what a
// difference of nothing looks like. "prepare_us" is what the back end itself takes to be told of all tensors anew.

#ifdef WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <array>
#include <chrono>
#include <iostream>

#include "bench.h"
#include "words.h"

namespace mc = modcompile;

namespace {

using Clock = std::chrono::steady_clock;

// A back end that this program was built with.
struct Known {
  const char* runtime;
  OpenBare* open;
  // Whether it writes outputs to memory of the caller's.
  bool takes_buffers;
};

constexpr Known kBackends[] = {
#ifdef BENCH_ORT
    {"ort", open_ort, true},
#endif
#ifdef BENCH_AOTI
    {"aoti", open_aoti, false},
#endif
#ifdef BENCH_TRT
    {"tensorrt", open_trt, true},
#endif
    {"", nullptr, false},
};

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

void measure(const Known& known, const std::string& folder, int runs, const Tensors& tensors, bool on_gpu,
             bool is_graph) {
  mc::LoadOptions load;
  if (std::string(known.runtime) == "ort") load.intra_op_threads = 1;
  // Both sides run what is in the model.
  load.custom_ops = false;
  load.cuda_graph = is_graph;
  const mc::Engine engine = mc::Engine::load(folder, load);
  Task task{engine, on_gpu, is_graph, {}, {}};
  const mc::Memory where = on_gpu ? mc::Memory::kDevice : mc::Memory::kHost;
  mc::Context context = engine.make_context();
  for (const mc::Input& input : tensors.inputs) {
    void* const data = place(bytes_of(input.dtype, input.shape), input.data, on_gpu);
    task.inputs.push_back({input.name, input.dtype, input.shape, data, where});
  }
  if (known.takes_buffers) {
    // A context of its own: the shapes are not known before, and a graph's memory stays what it was.
    mc::Context sizes = engine.make_context();
    for (const mc::Output& output : sizes.run(task.inputs)) {
      void* const data = place(bytes_of(output.dtype, output.shape), nullptr, on_gpu);
      task.buffers.push_back({output.name, output.dtype, output.shape, data, where});
    }
  }
  std::string version;
  const std::unique_ptr<Bare> bare = known.open(task, version), again = known.open(task, version);
  bare->prepare();
  again->prepare();

  std::vector<double> bare_us, ours_us, difference_us, noise_us, prepare_us;
  for (int run = -30; run < runs; ++run) {
    // In each of the six orders as often as in the others.
    const int first = run + 30, step = 1 + first / 3 % 2;
    std::array<double, 3> taken{};
    for (int turn = 0; turn < 3; ++turn) {
      const int who = (first + turn * step) % 3;
      taken[static_cast<size_t>(who)] = who == 0   ? microseconds([&] { bare->run(); })
                                        : who == 1 ? microseconds([&] { again->run(); })
                                                   : microseconds([&] { context.run(task.inputs, task.buffers); });
    }
    if (run < 0) continue;
    bare_us.push_back(taken[0]);
    ours_us.push_back(taken[2]);
    difference_us.push_back(taken[2] - taken[0]);
    noise_us.push_back(taken[1] - taken[0]);
  }
  // Last: a graph's memory is not told of anew between its runs.
  for (int run = 0; run < runs; ++run) prepare_us.push_back(microseconds([&] { bare->prepare(); }));
  std::cout << "{\"runtime\": \"" << known.runtime << "\", \"version\": \"" << version << "\", \"device\": \""
            << (on_gpu ? "cuda" : "cpu") << "\", \"cuda_graph\": " << (is_graph ? "true" : "false")
            << ", \"runs\": " << runs << ", \"bare_us\": " << median(bare_us)
            << ", \"modcompile_us\": " << median(ours_us) << ", \"difference_us\": " << median(difference_us)
            << ", \"noise_us\": " << median(noise_us) << ", \"prepare_us\": " << median(prepare_us) << "}"
            << std::endl;
}

bool is_on_gpu(const mc::Manifest& manifest) {
  if (manifest.runtime == "aoti") {
    const auto device = manifest.target.find("device");
    return device != manifest.target.end() && device->second == "cuda";
  }
  const std::vector<std::string>& providers = manifest.providers;
  return manifest.runtime == "tensorrt" ||
         std::find(providers.begin(), providers.end(), "CUDAExecutionProvider") != providers.end();
}

bool is_static(const mc::Manifest& manifest) {
  return std::all_of(manifest.inputs.begin(), manifest.inputs.end(), [](const mc::TensorSpec& spec) {
    return std::all_of(spec.shape.begin(), spec.shape.end(), [](const mc::Dim& dim) { return dim.symbol.empty(); });
  });
}

int bench(int count, char** arguments) {
  const Words words(arguments, arguments + count);
  const Tensors tensors(words, 3);
  const std::string& folder = words.at(1);
  const mc::Manifest manifest = mc::Engine::load(folder).manifest();
  const auto known = std::find_if(std::begin(kBackends), std::end(kBackends), [&](const Known& one) {
    return one.open != nullptr && manifest.runtime == one.runtime;
  });
  if (known == std::end(kBackends)) throw std::runtime_error("built without " + manifest.runtime);
  const int runs = std::stoi(words.at(2));
  const bool on_gpu = is_on_gpu(manifest);
  measure(*known, folder, runs, tensors, on_gpu, false);
  if (on_gpu && is_static(manifest)) measure(*known, folder, runs, tensors, on_gpu, true);
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
