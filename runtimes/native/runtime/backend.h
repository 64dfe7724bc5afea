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
  // Inputs in the engine's order; for each output a buffer or null. Fills shape and data of the outputs.
  // Throws what the back end throws.
  virtual void run(const std::vector<const Input*>& inputs, const std::vector<const Buffer*>& buffers,
                   std::vector<Output>& outputs) = 0;
};

// An engine that is loaded; its runners may run at the same time.
class Backend {
 public:
  virtual ~Backend() = default;
  // In messages, as "ONNX Runtime".
  virtual const char* name() const = 0;
  virtual std::unique_ptr<Runner> make_runner() const = 0;
};

// Opens an engine whose files were verified just now.
std::unique_ptr<Backend> load_ort(const std::string& folder, const Manifest& manifest, const LoadOptions& options);

// What to do where memory ran out, and whether an error says that it did.
inline constexpr const char* kMoreMemory =
    "run fewer or shorter sequences at a time, or free memory: close the engines that are not in use";
bool is_out_of_memory(const std::string& message);

}  // namespace modcompile

#endif  // MODCOMPILE_RUNTIME_BACKEND_H_
