// Runs the bundles that `modcompile package` and `modcompile build` write. C++17, Linux.
//
//   const auto engine = modcompile::Engine::load("minilm");
//   auto context = engine.make_context();
//   const auto& outputs = context.run({{"input_ids", modcompile::DType::kInt64, {8, 256}, ids},
//                                      {"attention_mask", modcompile::DType::kInt64, {8, 256}, mask}});
//
// A bundle is checked before anything of it is parsed or loaded: the manifest's own digest, then the SHA-256 of every
// file, no file more and none less, no links. That notices accidents. It is no signature: whoever can write to the
// folder can write a manifest that fits.
//
// An engine on a GPU takes tensors in host memory and in its device's. Without a stream of the caller's, a run reads what
// is there when it is called, and returns when its outputs are there. On a stream of the caller's it comes after what
// the stream was given before, and what the stream is given next comes after the run; a run whose tensors are all in
// device memory then returns without waiting.
//
// An engine may be shared by threads; a context belongs to one thread at a time. What goes wrong is thrown as an Error,
// which says what the Python package says, apart from advice that is about Python and words of the back end's own.

#ifndef MODCOMPILE_ENGINE_H_
#define MODCOMPILE_ENGINE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#define MODCOMPILE_API __attribute__((visibility("default")))

namespace modcompile {

// What went wrong, by the exit codes of the command line.
enum class ErrorKind { kOther = 1, kUsage = 2, kUnsupportedGraph = 3, kRuntimeUnavailable = 5, kIntegrity = 6 };

// One sentence, and where they are known: what would have been right, what was there instead, where, and what to do.
struct Details {
  std::string expected, found, where, fix;
};

class MODCOMPILE_API Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& problem, Details details);
  ~Error() override;

  ErrorKind kind() const { return kind_; }
  const std::string& problem() const { return problem_; }
  const Details& details() const { return details_; }

 private:
  ErrorKind kind_;
  std::string problem_;
  Details details_;
};

enum class DType {
  kBool, kUint8, kInt8, kUint16, kInt16, kUint32, kInt32, kUint64, kInt64, kFloat16, kBfloat16, kFloat32, kFloat64
};

// NumPy's name, or "bfloat16".
MODCOMPILE_API const char* name_of(DType dtype);
// The dtype of a name, if there is one.
MODCOMPILE_API std::optional<DType> dtype_of(const std::string& name);
// Bytes of an element.
MODCOMPILE_API size_t size_of(DType dtype);

// A size; or a symbol such as "batch", whose size is 0 here and one in all inputs of a run.
struct Dim {
  int64_t size = 0;
  std::string symbol;

  bool operator==(const Dim& other) const { return size == other.size && symbol == other.symbol; }
};

struct TensorSpec {
  std::string name;
  DType dtype;
  std::vector<Dim> shape;

  bool operator==(const TensorSpec& other) const {
    return name == other.name && dtype == other.dtype && shape == other.shape;
  }
};

// "input_ids int64 [batch, 128]"
MODCOMPILE_API std::string text_of(const TensorSpec& spec);

struct RoutedBlock {
  // The block's module path in the source model.
  std::string path;
  // K/S as an exact fraction "p/q".
  std::string capacity_ratio;
  // S, the size of the routed axis.
  Dim rows;
  // K where S is a number, else 0.
  int64_t capacity;
};

struct FileRecord {
  // In lower-case hex.
  std::string sha256;
  uint64_t size;
};

// What a bundle is.
struct Manifest {
  std::string modcompile_version;
  // The back end that loads it, "ort" for example, the version it was built with, and the versions that can load it:
  // from the minimum on, below the other where there is one.
  std::string runtime, runtime_version, runtime_minimum, runtime_below;
  // Of the weights: "fp32", "fp16" or "bf16".
  std::string precision;
  // The file that the back end loads, and the tokenizer's or "".
  std::string entry, tokenizer;
  std::vector<TensorSpec> inputs, outputs;
  // Empty for a dense model.
  std::vector<RoutedBlock> routed_blocks;
  // ONNX Runtime's execution providers, in order of preference.
  std::vector<std::string> providers;
  // What else the engine is bound to, as a GPU's architecture.
  std::map<std::string, std::string> target;
  // Every file but the manifest, by relative path.
  std::map<std::string, FileRecord> files;
};

// The host's, or that of the engine's GPU.
enum class Memory { kHost, kDevice };

// A tensor of the caller's that a run reads, rows after rows.
struct Input {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  const void* data;
  Memory memory = Memory::kHost;
};

// Memory of the caller's that a run writes an output to.
struct Buffer {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  void* data;
  Memory memory = Memory::kHost;
};

// An output: in the caller's buffer, or in memory of the context, where it stays until the context's next run. That is
// device memory where every input is in device memory.
struct Output {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  const void* data;
  Memory memory = Memory::kHost;
};

struct LoadOptions {
  // Threads that one run of ONNX Runtime computes with; 0 leaves it to ONNX Runtime.
  int intra_op_threads = 0;
  // ONNX Runtime's execution providers; the manifest's where there are none here. Likewise for ONNX Runtime alone.
  std::vector<std::string> providers;
  // Whether the bundle's custom-op library runs our ops, or the function bodies in the model.
  bool custom_ops = true;
  // The GPU's number, for engines that run on one.
  int device = 0;
  // The cudaStream_t to run on; without one the engine has streams of its own. It must outlive the engine.
  void* stream = nullptr;
  // Records the first run of each context as a CUDA graph, which its next runs launch as a whole. Sizes are static, and
  // the tensors of all its runs are the same memory, the device's.
  bool cuda_graph = false;
};

// Of one thread at a time. It keeps its engine alive.
class MODCOMPILE_API Context {
 public:
  Context(Context&&) noexcept;
  Context& operator=(Context&&) noexcept;
  ~Context();

  // Runs the engine once, and waits for it. What the last run made ready is kept for tensors that stay where they were:
  // a loop takes the least time on the same memory.
  //
  // inputs: Every input, in any order.
  // buffers: Where outputs go; outputs that are not named here stay with the context.
  // Returns every output, in the order of the engine's.
  // Throws Error kUsage for what the engine does not take, and kOther where the back end fails.
  const std::vector<Output>& run(const std::vector<Input>& inputs, const std::vector<Buffer>& buffers = {});

 private:
  friend class Engine;
  struct State;
  explicit Context(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// A bundle that is loaded. Copies are the same engine, which is freed with the last of them and of its contexts.
class MODCOMPILE_API Engine {
 public:
  // Checks a bundle and loads it.
  //
  // Throws Error
  //   kUsage: no such folder, or an option that does not fit
  //   kIntegrity: a file is missing, truncated, edited, foreign or not a regular file; it is named
  //   kRuntimeUnavailable: a back end, its version or a device is missing; or the bundle is of a newer format
  //   kUnsupportedGraph: the back end does not run the model
  static Engine load(const std::string& folder, const LoadOptions& options = {});

  const std::string& folder() const;
  const Manifest& manifest() const;
  const std::vector<TensorSpec>& inputs() const { return manifest().inputs; }
  const std::vector<TensorSpec>& outputs() const { return manifest().outputs; }

  // stream: The cudaStream_t of this context's runs; by default the engine's. ONNX Runtime has one for all of them.
  Context make_context(void* stream = nullptr) const;

 private:
  struct State;
  friend class Context;
  explicit Engine(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

// The back ends that this library was built with, as "ort".
MODCOMPILE_API std::vector<std::string> backends();

}  // namespace modcompile

#endif  // MODCOMPILE_ENGINE_H_
