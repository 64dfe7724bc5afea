// What a back end has to offer. engine.cc checks bundles and inputs, so a back end sees only what fits.

#ifndef MODCOMPILE_RUNTIME_BACKEND_H_
#define MODCOMPILE_RUNTIME_BACKEND_H_

#include <memory>
#include <string>
#include <vector>

#include "modcompile/engine.h"

namespace modcompile {

// One caller's runs.
class Runner {
 public:
  virtual ~Runner() = default;
  // Inputs in the engine's order; for each output a buffer or null. Fills shape, data and memory of the outputs.
  // Throws what the back end throws. For a CUDA graph, memory is the same in every call.
  virtual void run(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers,
                   std::vector<Output>& outputs) = 0;
};

// An engine that is loaded; its runners may run at the same time.
class Backend {
 public:
  virtual ~Backend() = default;
  // In messages, as "ONNX Runtime".
  virtual const char* name() const = 0;
  // Whether it takes device memory.
  virtual bool on_gpu() const = 0;
  // stream: The caller's, or null.
  virtual std::unique_ptr<Runner> make_runner(void* stream) const = 0;
};

// Opens an engine whose files were verified just now. The manifest stays where it is as long as the engine.
using Load = std::unique_ptr<Backend>(const std::string& folder, const Manifest& manifest, const LoadOptions& options);
Load load_aoti, load_ort, load_trt;

// Throws for a stream, a GPU's number or a CUDA graph where an engine runs on the CPU.
void refuse_gpu_options(const LoadOptions& options, const std::string& found);

inline size_t bytes_of(DType dtype, const std::vector<int64_t>& shape) {
  size_t bytes = size_of(dtype);
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  return bytes;
}

// Where a tensor of the caller's was in the last run, whose preparations hold for a tensor that is still there. They go
// by address and shape and keep nothing of what the memory holds. So they hold as well where it was freed since, and
// what lies there now is another tensor of this shape. That a pointer is of freed memory is seen in no run, first or
// later.
class Place {
 public:
  // Whether no memory of the caller's was given.
  bool is_own() const { return data_ == nullptr; }

  template <typename Tensor>
  bool has(const Tensor* tensor) const {
    return tensor != nullptr && tensor->data == data_ && tensor->memory == memory_ && tensor->shape == shape_;
  }

  template <typename Tensor>
  void keep(const Tensor* tensor) {
    data_ = nullptr;
    if (tensor == nullptr) return;
    shape_ = tensor->shape;
    memory_ = tensor->memory;
    data_ = tensor->data;
  }

 private:
  const void* data_ = nullptr;
  Memory memory_ = Memory::kHost;
  std::vector<int64_t> shape_;
};

// What to do where memory ran out, and whether an error says that it did.
inline constexpr const char* kMoreMemory =
    "run fewer or shorter sequences at a time, or free memory: close the engines that are not in use";
bool is_out_of_memory(const std::string& message);

}  // namespace modcompile

#endif  // MODCOMPILE_RUNTIME_BACKEND_H_
