#include "modcompile/engine_c.h"

#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "modcompile/engine.h"

namespace mc = modcompile;

struct modcompile_engine {
  explicit modcompile_engine(mc::Engine loaded) : engine(std::move(loaded)) {
    describe(engine.inputs(), inputs);
    describe(engine.outputs(), outputs);
  }

  mc::Engine engine;
  std::vector<modcompile_tensor> inputs, outputs;

 private:
  void describe(const std::vector<mc::TensorSpec>& specs, std::vector<modcompile_tensor>& tensors) {
    for (const mc::TensorSpec& spec : specs) {
      std::vector<int64_t>& shape = *shapes_.emplace_back(std::make_unique<std::vector<int64_t>>());
      for (const mc::Dim& dim : spec.shape) shape.push_back(dim.symbol.empty() ? dim.size : -1);
      tensors.push_back({spec.name.c_str(), static_cast<int32_t>(spec.dtype), shape.size(), shape.data(), nullptr,
                         MODCOMPILE_HOST});
    }
  }

  // Each stays where it is while the list of them grows.
  std::vector<std::unique_ptr<std::vector<int64_t>>> shapes_;
};

struct modcompile_context {
  mc::Context context;
  std::vector<modcompile_tensor> outputs;
};

namespace {

static_assert(static_cast<int>(mc::DType::kBool) == MODCOMPILE_BOOL);
static_assert(static_cast<int>(mc::DType::kFloat64) == MODCOMPILE_FLOAT64);
static_assert(static_cast<int>(mc::Memory::kDevice) == MODCOMPILE_DEVICE);

thread_local std::string last_error;

modcompile_status failed(modcompile_status status, const char* text) {
  last_error = text;
  return status;
}

// Calls a function; what it throws becomes a status and a text.
template <typename Function>
modcompile_status guarded(Function function) {
  try {
    function();
    return MODCOMPILE_OK;
  } catch (const mc::Error& error) {
    return failed(static_cast<modcompile_status>(error.kind()), error.what());
  } catch (const std::exception& error) {
    return failed(MODCOMPILE_ERROR, error.what());
  }
}

// C has no types to keep a caller from these.
void require(bool holds, const char* problem, const char* expected) {
  if (!holds) throw mc::Error(mc::ErrorKind::kUsage, problem, {expected, "", "", ""});
}

template <typename Tensor>
std::vector<Tensor> read(const modcompile_tensor* tensors, size_t count) {
  require(tensors != nullptr || count == 0, "the tensors are missing", "a pointer to as many tensors as their count");
  std::vector<Tensor> made;
  for (const modcompile_tensor* tensor = tensors; tensor != tensors + count; ++tensor) {
    require(tensor->name != nullptr, "a tensor has no name", "the name of an input or output");
    require(tensor->shape != nullptr || tensor->rank == 0, "a tensor has no shape",
            "a pointer to as many sizes as its rank");
    require(tensor->dtype >= MODCOMPILE_BOOL && tensor->dtype <= MODCOMPILE_FLOAT64, "a tensor has no dtype",
            "a value of modcompile_dtype");
    require(tensor->memory == MODCOMPILE_HOST || tensor->memory == MODCOMPILE_DEVICE, "a tensor is in no memory",
            "a value of modcompile_memory");
    made.push_back({tensor->name, static_cast<mc::DType>(tensor->dtype), {tensor->shape, tensor->shape + tensor->rank},
                    tensor->data, static_cast<mc::Memory>(tensor->memory)});
  }
  return made;
}

const modcompile_tensor* at(const std::vector<modcompile_tensor>& tensors, size_t index) {
  return index < tensors.size() ? &tensors[index] : nullptr;
}

}  // namespace

const char* modcompile_last_error() { return last_error.c_str(); }

modcompile_status modcompile_engine_load(const char* folder, const modcompile_options* options,
                                         modcompile_engine** engine) {
  return guarded([&] {
    require(engine != nullptr, "there is no place for the engine", "a pointer to a modcompile_engine*");
    *engine = nullptr;
    require(folder != nullptr, "the engine's folder is missing", "a path");
    mc::LoadOptions chosen;
    if (options != nullptr) {
      chosen.intra_op_threads = options->intra_op_threads;
      chosen.custom_ops = options->without_custom_ops == 0;
      chosen.device = options->device;
      chosen.stream = options->stream;
      chosen.cuda_graph = options->cuda_graph != 0;
      require(options->providers != nullptr || options->provider_count == 0, "the providers are missing",
              "a pointer to as many names as their count");
      for (size_t i = 0; i < options->provider_count; ++i) {
        require(options->providers[i] != nullptr, "a provider has no name", "the name of an execution provider");
        chosen.providers.emplace_back(options->providers[i]);
      }
    }
    *engine = new modcompile_engine(mc::Engine::load(folder, chosen));
  });
}

void modcompile_engine_free(modcompile_engine* engine) { delete engine; }

size_t modcompile_engine_input_count(const modcompile_engine* engine) {
  return engine == nullptr ? 0 : engine->inputs.size();
}

size_t modcompile_engine_output_count(const modcompile_engine* engine) {
  return engine == nullptr ? 0 : engine->outputs.size();
}

const modcompile_tensor* modcompile_engine_input(const modcompile_engine* engine, size_t index) {
  return engine == nullptr ? nullptr : at(engine->inputs, index);
}

const modcompile_tensor* modcompile_engine_output(const modcompile_engine* engine, size_t index) {
  return engine == nullptr ? nullptr : at(engine->outputs, index);
}

const char* modcompile_engine_tokenizer(const modcompile_engine* engine) {
  return engine == nullptr ? "" : engine->engine.manifest().tokenizer.c_str();
}

modcompile_status modcompile_context_make(const modcompile_engine* engine, void* stream,
                                          modcompile_context** context) {
  return guarded([&] {
    require(context != nullptr, "there is no place for the context", "a pointer to a modcompile_context*");
    *context = nullptr;
    require(engine != nullptr, "the engine is missing", "an engine that modcompile_engine_load gave");
    *context = new modcompile_context{engine->engine.make_context(stream), {}};
  });
}

void modcompile_context_free(modcompile_context* context) { delete context; }

modcompile_status modcompile_context_run(modcompile_context* context, const modcompile_tensor* inputs,
                                         size_t input_count, const modcompile_tensor* buffers, size_t buffer_count) {
  return guarded([&] {
    require(context != nullptr, "the context is missing", "a context that modcompile_context_make gave");
    context->outputs.clear();
    const auto& outputs = context->context.run(read<mc::Input>(inputs, input_count),
                                               read<mc::Buffer>(buffers, buffer_count));
    for (const mc::Output& output : outputs) {
      context->outputs.push_back({output.name.c_str(), static_cast<int32_t>(output.dtype), output.shape.size(),
                                  output.shape.data(), const_cast<void*>(output.data),
                                  static_cast<int32_t>(output.memory)});
    }
  });
}

const modcompile_tensor* modcompile_context_output(const modcompile_context* context, size_t index) {
  return context == nullptr ? nullptr : at(context->outputs, index);
}
