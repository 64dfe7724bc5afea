// A back end without the C++ runtime, for bench_engine: bench_ort.cc, bench_aoti.cc and bench_trt.cc have one each.

#ifndef MODCOMPILE_TESTS_BENCH_H_
#define MODCOMPILE_TESTS_BENCH_H_

#include <memory>
#include <string>
#include <vector>

#include "modcompile/engine.h"

// What is run: a bundle's model, on this memory.
struct Task {
  const modcompile::Engine& engine;
  bool on_gpu, is_graph;
  std::vector<modcompile::Input> inputs;
  // Every output's; none where the back end cannot write to memory of the caller's.
  std::vector<modcompile::Buffer> buffers;

  std::string entry() const { return engine.folder() + "/" + engine.manifest().entry; }
};

// A model that a back end opened with the options that the C++ runtime gives it. The task outlives it.
class Bare {
 public:
  virtual ~Bare() = default;
  // Tells the back end of all tensors, as the first run needs it.
  virtual void prepare() = 0;
  // Runs it and waits.
  virtual void run() = 0;
};

// version: Becomes the back end's.
using OpenBare = std::unique_ptr<Bare>(const Task& task, std::string& version);
OpenBare open_ort, open_aoti, open_trt;

#endif  // MODCOMPILE_TESTS_BENCH_H_
