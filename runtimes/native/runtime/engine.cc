#include "modcompile/engine.h"

#include <algorithm>
#include <cctype>
#include <limits>
#include <new>
#include <set>
#include <utility>

#include "backend.h"
#include "manifest.h"
#include "text.h"

namespace modcompile {

struct Engine::State {
  std::string folder;
  Manifest manifest;
  std::unique_ptr<Backend> backend;
};

struct Context::State {
  std::shared_ptr<const Engine::State> engine;
  std::unique_ptr<Runner> runner;
  std::vector<Output> outputs;
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
  std::string source;
};

// Throws unless a tensor of the caller's fits. An output may have a symbol that no input has.
template <typename Tensor>
void check_tensor(const char* role, const TensorSpec& spec, const Tensor& given, std::map<std::string, Known>& sizes) {
  const std::string subject = std::string(role) + " " + spec.name, shape = "shape " + text_of(given.shape);
  if (given.dtype != spec.dtype) {
    throw usage(subject + " has the wrong dtype", {name_of(spec.dtype), name_of(given.dtype), spec.name,
                                                   std::string("pass ") + name_of(spec.dtype)});
  }
  if (given.shape.size() != spec.shape.size()) {
    throw usage(subject + " has the wrong rank",
                {text_of(spec), shape, spec.name, "give it " + std::to_string(spec.shape.size()) + " dims"});
  }
  uint64_t bytes = size_of(spec.dtype);
  for (size_t axis = 0; axis < spec.shape.size(); ++axis) {
    const Dim& dim = spec.shape[axis];
    const int64_t size = given.shape[axis];
    const std::string where = spec.name + ", axis " + std::to_string(axis);
    if (size == 0) throw usage(subject + " is empty", {text_of(spec), shape, where, "pass at least one row"});
    if (size < 0) throw usage(subject + " has a negative size", {text_of(spec), shape, where, ""});
    if (static_cast<uint64_t>(size) > std::numeric_limits<int64_t>::max() / bytes) {
      throw usage(subject + " is larger than memory can be", {text_of(spec), shape, where, ""});
    }
    bytes *= static_cast<uint64_t>(size);
    if (dim.symbol.empty()) {
      if (size != dim.size) {
        throw usage(subject + " has the wrong size",
                    {text_of(spec), shape, where, "pad or cut it to " + std::to_string(dim.size) +
                     ", or build the engine for " + std::to_string(size)});
      }
      continue;
    }
    const auto& [name, known] = *sizes.try_emplace(dim.symbol, Known{size, spec.name}).first;
    if (size != known.size) {
      const std::string symbol = repr(name), equals = name + " = ";
      throw usage("two " + std::string(role) + "s disagree about " + symbol,
                  {equals + std::to_string(known.size) + ", as in " + known.source,
                   equals + std::to_string(size) + ", " + shape, where,
                   known.source != spec.name ? "give " + known.source + " and " + spec.name + " the same " + name
                                             : "all axes of " + spec.name + " that are " + name + " have one size"});
    }
  }
  if (given.data == nullptr) {
    throw usage(subject + " has no data", {"a pointer to " + std::to_string(bytes) + " bytes", "a null pointer",
                                           spec.name, ""});
  }
}

// Throws for a name that the engine does not have, or that is there twice.
template <typename Tensor>
void check_names(const char* role, const std::vector<TensorSpec>& specs, const std::vector<Tensor>& given) {
  std::set<std::string> seen;
  for (const Tensor& tensor : given) {
    if (find(specs, tensor.name) == nullptr) {
      std::vector<std::string> free;
      for (const TensorSpec& spec : specs) {
        if (find(given, spec.name) == nullptr) free.push_back(spec.name);
      }
      throw usage(std::string("the engine has no ") + role + " of this name",
                  {names_of(specs), tensor.name, "", nearest(tensor.name, free)});
    }
    if (!seen.insert(tensor.name).second) {
      throw usage(std::string(role) + " " + tensor.name + " is given twice", {names_of(specs), "", tensor.name, ""});
    }
  }
}

std::vector<const Input*> check_inputs(const Manifest& manifest, const std::vector<Input>& given,
                                       std::map<std::string, Known>& sizes) {
  check_names("input", manifest.inputs, given);
  std::vector<const Input*> ordered;
  for (const TensorSpec& spec : manifest.inputs) {
    const Input* input = find(given, spec.name);
    if (input == nullptr) {
      std::vector<std::string> names;
      for (const Input& other : given) names.push_back(other.name);
      throw usage("input " + spec.name + " is missing",
                  {names_of(manifest.inputs), names.empty() ? "no inputs" : joined(names), "",
                   "pass " + text_of(spec)});
    }
    check_tensor("input", spec, *input, sizes);
    ordered.push_back(input);
  }
  return ordered;
}

std::vector<const Buffer*> check_buffers(const Manifest& manifest, const std::vector<Buffer>& given,
                                         std::map<std::string, Known>& sizes) {
  check_names("output", manifest.outputs, given);
  std::vector<const Buffer*> ordered;
  for (const TensorSpec& spec : manifest.outputs) {
    const Buffer* buffer = find(given, spec.name);
    if (buffer != nullptr) check_tensor("output", spec, *buffer, sizes);
    ordered.push_back(buffer);
  }
  return ordered;
}

}  // namespace

bool is_out_of_memory(const std::string& message) {
  std::string text = message;
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  // How ONNX Runtime, CUDA and C++ say it.
  for (const char* sign : {"out of memory", "can't allocate memory", "failed to allocate memory",
                           "smaller than requested bytes", "alloc_failed", "bad_alloc"}) {
    if (text.find(sign) != std::string::npos) return true;
  }
  return false;
}

Context::Context(std::unique_ptr<State> state) : state_(std::move(state)) {}
Context::Context(Context&&) noexcept = default;
Context& Context::operator=(Context&&) noexcept = default;
Context::~Context() = default;

const std::vector<Output>& Context::run(const std::vector<Input>& inputs, const std::vector<Buffer>& buffers) {
  const Engine::State& engine = *state_->engine;
  std::map<std::string, Known> sizes;
  const std::vector<const Input*> ordered = check_inputs(engine.manifest, inputs, sizes);
  const std::vector<const Buffer*> places = check_buffers(engine.manifest, buffers, sizes);
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
  const std::vector<std::string> known = backends();
  if (std::find(known.begin(), known.end(), manifest.runtime) == known.end()) {
    throw Error(ErrorKind::kRuntimeUnavailable, "this library was built without the runtime of the engine",
                {joined(known), manifest.runtime, state->folder,
                 "build runtimes/native with the option of this back end"});
  }
  if (options.intra_op_threads < 0) {
    throw usage("intra_op_threads does not fit",
                {"a number of threads, at least 1", std::to_string(options.intra_op_threads), "intra_op_threads", ""});
  }
  verify_files(state->folder, manifest);
#ifdef MODCOMPILE_RUNTIME_ORT
  state->backend = load_ort(state->folder, manifest, options);
#endif
  return Engine(std::move(state));
}

const std::string& Engine::folder() const { return state_->folder; }

const Manifest& Engine::manifest() const { return state_->manifest; }

Context Engine::make_context() const {
  auto context = std::make_unique<Context::State>();
  context->engine = state_;
  context->runner = state_->backend->make_runner();
  for (const TensorSpec& spec : outputs()) context->outputs.push_back({spec.name, spec.dtype, {}, nullptr});
  return Context(std::move(context));
}

std::vector<std::string> backends() {
  return {
#ifdef MODCOMPILE_RUNTIME_ORT
      "ort",
#endif
  };
}

}  // namespace modcompile
