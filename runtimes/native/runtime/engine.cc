#include "modcompile/engine.h"

#include <algorithm>
#include <cctype>
#include <initializer_list>
#include <limits>
#include <new>
#include <optional>
#include <utility>

#include "backend.h"
#include "manifest.h"
#include "text.h"

namespace modcompile {

struct Engine::State {
  std::string folder;
  Manifest manifest;
  void* stream = nullptr;
  bool cuda_graph = false;
  std::unique_ptr<Backend> backend;
};

namespace {

// Tensors of the caller's that fit, and the same in the engine's order.
struct Checked {
  std::vector<Input> inputs;
  std::vector<Buffer> buffers;
  std::vector<const Input*> ordered;
  std::vector<const Buffer*> places;
};

}  // namespace

struct Context::State {
  std::shared_ptr<const Engine::State> engine;
  std::unique_ptr<Runner> runner;
  std::vector<Output> outputs;
  // Of the last run. Another one of tensors that differ by their addresses alone is not checked again.
  std::optional<Checked> checked;
  // Of the tensors that a CUDA graph was recorded with.
  std::vector<const void*> addresses;
};

namespace {

Error usage(const std::string& problem, Details details) { return {ErrorKind::kUsage, problem, std::move(details)}; }

template <typename Tensor>
const Tensor* find(const std::vector<Tensor>& tensors, const std::string& name) {
  const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& t) { return t.name == name; });
  return found == tensors.end() ? nullptr : &*found;
}

// A symbol's size, and the tensor that it was first seen in.
struct Known {
  int64_t size;
  const std::string& source;
};

// Throws unless a tensor of the caller's fits. An output may have a symbol that no input has. Texts are made where it
// does not: they would take most of the time of a run's checks.
template <typename Tensor>
void check_tensor(const char* role, const TensorSpec& spec, const Tensor& given, bool on_gpu,
                  std::map<std::string, Known>& sizes) {
  const auto subject = [&] { return std::string(role) + " " + spec.name; };
  const auto shape = [&] { return "shape " + text_of(given.shape); };
  if (given.dtype != spec.dtype) {
    throw usage(subject() + " has the wrong dtype", {name_of(spec.dtype), name_of(given.dtype), spec.name,
                                                     std::string("pass ") + name_of(spec.dtype)});
  }
  if (given.shape.size() != spec.shape.size()) {
    throw usage(subject() + " has the wrong rank",
                {text_of(spec), shape(), spec.name, "give it " + std::to_string(spec.shape.size()) + " dims"});
  }
  uint64_t bytes = size_of(spec.dtype);
  for (size_t axis = 0; axis < spec.shape.size(); ++axis) {
    const Dim& dim = spec.shape[axis];
    const int64_t size = given.shape[axis];
    const auto where = [&] { return spec.name + ", axis " + std::to_string(axis); };
    if (size == 0) throw usage(subject() + " is empty", {text_of(spec), shape(), where(), "pass at least one row"});
    if (size < 0) throw usage(subject() + " has a negative size", {text_of(spec), shape(), where(), ""});
    if (static_cast<uint64_t>(size) > std::numeric_limits<int64_t>::max() / bytes) {
      throw usage(subject() + " is larger than memory can be", {text_of(spec), shape(), where(), ""});
    }
    bytes *= static_cast<uint64_t>(size);
    if (dim.symbol.empty()) {
      if (size != dim.size) {
        throw usage(subject() + " has the wrong size",
                    {text_of(spec), shape(), where(), "pad or cut it to " + std::to_string(dim.size) +
                     ", or build the engine for " + std::to_string(size)});
      }
      continue;
    }
    const auto& [name, known] = *sizes.try_emplace(dim.symbol, Known{size, spec.name}).first;
    if (size != known.size) {
      const std::string symbol = repr(name), equals = name + " = ";
      throw usage("two " + std::string(role) + "s disagree about " + symbol,
                  {equals + std::to_string(known.size) + ", as in " + known.source,
                   equals + std::to_string(size) + ", " + shape(), where(),
                   known.source != spec.name ? "give " + known.source + " and " + spec.name + " the same " + name
                                             : "all axes of " + spec.name + " that are " + name + " have one size"});
    }
  }
  if (given.memory == Memory::kDevice && !on_gpu) {
    throw usage(subject() + " is on a device that the engine does not run on",
                {"host memory", "device memory", spec.name, "pass host memory, or load an engine for a GPU"});
  }
  if (given.data == nullptr) {
    throw usage(subject() + " has no data", {"a pointer to " + std::to_string(bytes) + " bytes", "a null pointer",
                                             spec.name, ""});
  }
}

// Throws for a name that the engine does not have, or that is there twice.
template <typename Tensor>
void check_names(const char* role, const std::vector<TensorSpec>& specs, const std::vector<Tensor>& given) {
  for (const Tensor& tensor : given) {
    if (find(specs, tensor.name) == nullptr) {
      std::vector<std::string> free;
      for (const TensorSpec& spec : specs) {
        if (find(given, spec.name) == nullptr) free.push_back(spec.name);
      }
      throw usage(std::string("the engine has no ") + role + " of this name",
                  {names_of(specs), tensor.name, "", nearest(tensor.name, free)});
    }
    if (find(given, tensor.name) != &tensor) {
      throw usage(std::string(role) + " " + tensor.name + " is given twice", {names_of(specs), "", tensor.name, ""});
    }
  }
}

void check_inputs(const Manifest& manifest, const std::vector<Input>& given, bool on_gpu,
                  std::map<std::string, Known>& sizes) {
  check_names("input", manifest.inputs, given);
  for (const TensorSpec& spec : manifest.inputs) {
    const Input* input = find(given, spec.name);
    if (input == nullptr) {
      std::vector<std::string> names;
      for (const Input& other : given) names.push_back(other.name);
      throw usage("input " + spec.name + " is missing",
                  {names_of(manifest.inputs), names.empty() ? "no inputs" : joined(names), "",
                   "pass " + text_of(spec)});
    }
    check_tensor("input", spec, *input, on_gpu, sizes);
  }
}

void check_buffers(const Manifest& manifest, const std::vector<Buffer>& given, bool on_gpu,
                   std::map<std::string, Known>& sizes) {
  check_names("output", manifest.outputs, given);
  for (const TensorSpec& spec : manifest.outputs) {
    const Buffer* buffer = find(given, spec.name);
    if (buffer != nullptr) check_tensor("output", spec, *buffer, on_gpu, sizes);
  }
}

Checked check_all(const Manifest& manifest, const std::vector<Input>& inputs, const std::vector<Buffer>& buffers,
                  bool on_gpu) {
  std::map<std::string, Known> sizes;
  check_inputs(manifest, inputs, on_gpu, sizes);
  check_buffers(manifest, buffers, on_gpu, sizes);
  Checked checked{inputs, buffers, {}, {}};
  for (const TensorSpec& spec : manifest.inputs) checked.ordered.push_back(find(checked.inputs, spec.name));
  for (const TensorSpec& spec : manifest.outputs) checked.places.push_back(find(checked.buffers, spec.name));
  return checked;
}

// Whether all that a check looks at is as it was in tensors that passed: all but where the memory lies. Whether it is as
// much as the shape says, or any at all, no check sees, the first time or later.
template <typename Tensor>
bool still_fit(const std::vector<Tensor>& given, const std::vector<Tensor>& passed) {
  const auto fits = [](const Tensor& tensor, const Tensor& before) {
    return tensor.data != nullptr && tensor.memory == before.memory && tensor.dtype == before.dtype &&
           tensor.shape == before.shape && tensor.name == before.name;
  };
  return std::equal(given.begin(), given.end(), passed.begin(), passed.end(), fits);
}

// A CUDA graph reads and writes the memory that it was recorded with, whatever a later run names.
void check_addresses(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers,
                     std::vector<const void*>& recorded) {
  std::vector<const void*> addresses;
  const auto add = [&addresses](const auto* tensor) {
    if (tensor != nullptr && tensor->memory != Memory::kDevice) {
      throw usage("a CUDA graph takes device memory", {"device memory", "host memory", tensor->name,
                                                       "copy it to the device, or load without cuda_graph"});
    }
    addresses.push_back(tensor == nullptr ? nullptr : tensor->data);
  };
  for (const Input* input : inputs) add(input);
  for (const Buffer* buffer : buffers) add(buffer);
  if (recorded.empty()) recorded = addresses;
  if (addresses != recorded) {
    throw usage("a CUDA graph reads and writes the memory that it was recorded with",
                {"the tensors of the context's first run", "other memory", "",
                 "copy into the first run's tensors, or make a context for each set of tensors"});
  }
}

// In the target of a manifest of ONNX Runtime's, as in runtimes/ort/session.py.
constexpr char kConstantOutputs[] = "constant outputs";

void check_graph(const Manifest& manifest, const std::string& folder) {
  std::vector<std::string> varying;
  for (const auto* specs : {&manifest.inputs, &manifest.outputs}) {
    for (const TensorSpec& spec : *specs) {
      const auto varies = [](const Dim& dim) { return !dim.symbol.empty(); };
      if (std::any_of(spec.shape.begin(), spec.shape.end(), varies)) varying.push_back(text_of(spec));
    }
  }
  if (!varying.empty()) {
    throw usage("a CUDA graph has one size",
                {"an engine of static shapes", joined(varying), folder,
                 "build the engine with shapes={...} for every input, or leave cuda_graph out"});
  }
  // ONNX Runtime copies them, which no capture allows, and a capture that fails ends the process.
  if (const auto constants = manifest.target.find(kConstantOutputs); constants != manifest.target.end()) {
    throw usage("a CUDA graph has no constants among its outputs",
                {"outputs that follow from inputs", constants->second, folder,
                 "leave them out of the model, or leave cuda_graph out"});
  }
}

// A runtime, and what loads its engines where this library has it.
struct Loader {
  const char* runtime;
  Load* load;
};

constexpr Loader kLoaders[] = {
#ifdef MODCOMPILE_RUNTIME_ORT
    {"ort", load_ort},
#endif
#ifdef MODCOMPILE_RUNTIME_TRT
    {"tensorrt", load_trt},
#endif
#ifdef MODCOMPILE_RUNTIME_AOTI
    {"aoti", load_aoti},
#endif
    {"", nullptr},
};

}  // namespace

void refuse_gpu_options(const LoadOptions& options, const std::string& found) {
  const char* const given = options.cuda_graph ? "a CUDA graph" : options.stream != nullptr ? "a stream"
                            : options.device != 0 ? "a GPU's number" : nullptr;
  if (given != nullptr) {
    throw usage(std::string(given) + " is for an engine on a GPU", {"an engine for a GPU", found, "", "leave it out"});
  }
}

namespace {

bool says_one_of(const std::string& message, std::initializer_list<const char*> signs) {
  std::string text = message;
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return std::any_of(signs.begin(), signs.end(),
                     [&](const char* sign) { return text.find(sign) != std::string::npos; });
}

}  // namespace

bool is_out_of_memory(const std::string& message) {
  // How ONNX Runtime, CUDA and C++ say it.
  return says_one_of(message, {"out of memory", "can't allocate memory", "failed to allocate memory",
                               "smaller than requested bytes", "alloc_failed", "bad_alloc"});
}

Context::Context(std::unique_ptr<State> state) : state_(std::move(state)) {}
Context::Context(Context&&) noexcept = default;
Context& Context::operator=(Context&&) noexcept = default;
Context::~Context() = default;

const std::vector<Output>& Context::run(const std::vector<Input>& inputs, const std::vector<Buffer>& buffers) {
  const Engine::State& engine = *state_->engine;
  std::optional<Checked>& checked = state_->checked;
  if (checked && still_fit(inputs, checked->inputs) && still_fit(buffers, checked->buffers)) {
    for (size_t i = 0; i < inputs.size(); ++i) checked->inputs[i].data = inputs[i].data;
    for (size_t i = 0; i < buffers.size(); ++i) checked->buffers[i].data = buffers[i].data;
  } else {
    checked = check_all(engine.manifest, inputs, buffers, engine.backend->on_gpu());
  }
  const std::vector<const Input*>& ordered = checked->ordered;
  const std::vector<const Buffer*>& places = checked->places;
  if (engine.cuda_graph) check_addresses(ordered, places, state_->addresses);
  try {
    state_->runner->run(ordered, places, state_->outputs);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    std::vector<std::string> shapes;
    for (const Input* input : ordered) shapes.push_back(input->name + " " + text_of(input->shape));
    const std::string found = joined(shapes) + ": " + error.what(), name = engine.backend->name();
    if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr || is_out_of_memory(error.what())) {
      throw Error(ErrorKind::kOther, "there is too little memory for a run of the engine on " + name,
                  {"", found, engine.folder, kMoreMemory});
    }
    // How runtimes say that a table has no row of an index.
    if (says_one_of(error.what(), {"out of bounds", "out of data bounds", "index out of range"})) {
      throw Error(ErrorKind::kUsage, "an input holds an index that the model has nothing for",
                  {"words of the vocabulary, and no more rows than the model has positions", found, engine.folder, ""});
    }
    throw Error(ErrorKind::kOther, name + " failed to run the engine",
                {texts_of(engine.manifest.inputs, ", "), found, engine.folder, ""});
  }
  return state_->outputs;
}

Engine::Engine(std::shared_ptr<const State> state) : state_(std::move(state)) {}

Engine Engine::load(const std::string& folder, const LoadOptions& options) {
  auto state = std::make_shared<State>();
  state->folder = folder;
  while (state->folder.size() > 1 && state->folder.back() == '/') state->folder.pop_back();
  state->manifest = read_manifest(state->folder);
  const Manifest& manifest = state->manifest;
  const auto loader = std::find_if(std::begin(kLoaders), std::end(kLoaders), [&](const Loader& known) {
    return known.load != nullptr && manifest.runtime == known.runtime;
  });
  if (loader == std::end(kLoaders)) {
    throw Error(ErrorKind::kRuntimeUnavailable, "this library was built without the runtime of the engine",
                {joined(backends()), manifest.runtime, state->folder,
                 "build runtimes/native with the option of this back end"});
  }
  if (options.intra_op_threads < 0) {
    throw usage("intra_op_threads does not fit",
                {"a number of threads, at least 1", std::to_string(options.intra_op_threads), "intra_op_threads", ""});
  }
  if (options.intra_op_threads > 0 && manifest.runtime != "ort") {
    throw usage("this runtime has no threads of one engine",
                {"intra_op_threads = 0", std::to_string(options.intra_op_threads), "intra_op_threads",
                 "leave it out; torch computes with as many threads as OMP_NUM_THREADS says"});
  }
  if (options.device < 0) {
    throw usage("device does not fit", {"a GPU's number, from 0 on", std::to_string(options.device), "device", ""});
  }
  if (options.cuda_graph) check_graph(manifest, state->folder);
  verify_files(state->folder, manifest);
  state->stream = options.stream;
  state->cuda_graph = options.cuda_graph;
  state->backend = loader->load(state->folder, manifest, options);
  return Engine(std::move(state));
}

const std::string& Engine::folder() const { return state_->folder; }

const Manifest& Engine::manifest() const { return state_->manifest; }

Context Engine::make_context(void* stream) const {
  if (stream != nullptr && !state_->backend->on_gpu()) {
    throw usage("a stream is for an engine on a GPU",
                {"no stream", "a stream", state_->folder, "leave the stream out, or load an engine for a GPU"});
  }
  auto context = std::make_unique<Context::State>();
  context->engine = state_;
  context->runner = state_->backend->make_runner(stream == nullptr ? state_->stream : stream);
  for (const TensorSpec& spec : outputs()) context->outputs.push_back({spec.name, spec.dtype, {}, nullptr});
  return Context(std::move(context));
}

std::vector<std::string> backends() {
  std::vector<std::string> names;
  for (const Loader& loader : kLoaders) {
    if (loader.load != nullptr) names.emplace_back(loader.runtime);
  }
  return names;
}

}  // namespace modcompile
