// Does what tests of the C++ runtime ask for. A command is a line of words between tabs; an answer ends with a zero
// byte.
//
//   sha256 FILE                           the digest
//   load FOLDER [OPTION...]               "ok", or the error's text; OPTIONs are stream, graph, device=1, threads=2, provider=NAME
//   describe FOLDER                       inputs, outputs and what else the manifest says
//   run FOLDER TARGET TENSOR...           "ok" and the outputs in files TARGET/NAME, or the error's text
//   run-bodies FOLDER TARGET TENSOR...    the same without the custom-op library
//   run-c FOLDER TARGET TENSOR...         the same through the C API
//   misuse-c FOLDER                       what the C API says of null pointers
//   threads FOLDER COUNT RUNS TENSOR...   "ok" if runs on several threads give what one thread gives
//   cycles FOLDER COUNT TENSOR...         memory in KiB before and after loading and freeing the engine so often
//
// A TENSOR is as words.h has it.

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "modcompile/engine.h"
#include "modcompile/engine_c.h"
#include "sha256.h"
#include "words.h"

namespace mc = modcompile;

namespace {

std::string contents_of(const mc::Output& output) {
  return {static_cast<const char*>(output.data), bytes_of(output.dtype, output.shape)};
}

// One thread of arithmetic: what is computed does not depend on the machine's cores. Not every runtime has the option.
const int kThreads = std::getenv("OWN_THREADS") == nullptr ? 1 : 0;
const mc::LoadOptions kOptions = [] {
  mc::LoadOptions options;
  options.intra_op_threads = kThreads;
  return options;
}();

std::string run(const Words& words) {
  const Tensors tensors(words, 3);
  mc::LoadOptions options = kOptions;
  options.custom_ops = words[0] != "run-bodies";
  mc::Context context = mc::Engine::load(words.at(1), options).make_context();
  for (const mc::Output& output : context.run(tensors.inputs, tensors.buffers)) {
    std::ofstream(words.at(2) + "/" + output.name, std::ios::binary) << contents_of(output);
    for (const mc::Buffer& buffer : tensors.buffers) {
      if (buffer.name == output.name && buffer.data != output.data) return "the output is not in its buffer";
    }
  }
  return "ok";
}

template <typename Tensor>
std::vector<modcompile_tensor> for_c(const std::vector<Tensor>& tensors) {
  std::vector<modcompile_tensor> made;
  for (const Tensor& tensor : tensors) {
    made.push_back({tensor.name.c_str(), static_cast<int32_t>(tensor.dtype), tensor.shape.size(),
                    tensor.shape.data(), const_cast<void*>(tensor.data), static_cast<int32_t>(tensor.memory)});
  }
  return made;
}

std::string run_c(const Words& words) {
  const Tensors tensors(words, 3);
  const std::vector<modcompile_tensor> inputs = for_c(tensors.inputs), buffers = for_c(tensors.buffers);
  modcompile_options options = {};
  options.intra_op_threads = kThreads;
  modcompile_engine* engine = nullptr;
  if (modcompile_engine_load(words.at(1).c_str(), &options, &engine) != MODCOMPILE_OK) return modcompile_last_error();
  modcompile_context* context = nullptr;
  modcompile_status status = modcompile_context_make(engine, nullptr, &context);
  const size_t count = modcompile_engine_output_count(engine);
  modcompile_engine_free(engine);
  if (status == MODCOMPILE_OK) {
    status = modcompile_context_run(context, inputs.data(), inputs.size(), buffers.data(), buffers.size());
  }
  for (size_t i = 0; status == MODCOMPILE_OK && i < count; ++i) {
    const modcompile_tensor& output = *modcompile_context_output(context, i);
    const mc::Output copy{output.name, static_cast<mc::DType>(output.dtype), {output.shape, output.shape + output.rank},
                          output.data};
    std::ofstream(words.at(2) + "/" + output.name, std::ios::binary) << contents_of(copy);
  }
  modcompile_context_free(context);
  return status == MODCOMPILE_OK ? "ok" : modcompile_last_error();
}

// Every null pointer that C lets a caller pass.
std::string misuse_c(const Words& words) {
  modcompile_engine *engine = nullptr, *other = nullptr;
  modcompile_context* context = nullptr;
  std::string answer;
  const auto expect = [&answer](modcompile_status status) {
    answer += std::to_string(status) + " " + split(modcompile_last_error(), '\n')[0] + "\n";
  };
  expect(modcompile_engine_load(nullptr, nullptr, &engine));
  expect(modcompile_engine_load(words.at(1).c_str(), nullptr, nullptr));
  expect(modcompile_context_make(nullptr, nullptr, &context));
  expect(modcompile_context_run(nullptr, nullptr, 0, nullptr, 0));
  if (modcompile_engine_load(words.at(1).c_str(), nullptr, &engine) != MODCOMPILE_OK) return modcompile_last_error();
  expect(modcompile_context_make(engine, nullptr, nullptr));
  if (modcompile_context_make(engine, nullptr, &context) != MODCOMPILE_OK) return modcompile_last_error();
  expect(modcompile_context_run(context, nullptr, 1, nullptr, 0));
  const int64_t size = 1;
  modcompile_tensor tensor = {nullptr, MODCOMPILE_INT64, 1, &size, nullptr, MODCOMPILE_HOST};
  expect(modcompile_context_run(context, &tensor, 1, nullptr, 0));
  tensor = {"x", 99, 1, &size, nullptr, MODCOMPILE_HOST};
  expect(modcompile_context_run(context, &tensor, 1, nullptr, 0));
  tensor = {"x", MODCOMPILE_INT64, 1, nullptr, nullptr, MODCOMPILE_HOST};
  expect(modcompile_context_run(context, &tensor, 1, nullptr, 0));
  tensor = {"x", MODCOMPILE_INT64, 1, &size, nullptr, 2};
  expect(modcompile_context_run(context, &tensor, 1, nullptr, 0));
  modcompile_options options = {};
  options.provider_count = 1;
  expect(modcompile_engine_load(words[1].c_str(), &options, &other));
  const char* const none = nullptr;
  options.providers = &none;
  expect(modcompile_engine_load(words[1].c_str(), &options, &other));
  if (modcompile_context_output(context, 0) != nullptr || modcompile_engine_input(engine, 99) != nullptr ||
      modcompile_engine_input(nullptr, 0) != nullptr || modcompile_engine_output_count(nullptr) != 0) {
    answer += "something was there that is not\n";
  }
  modcompile_context_free(context);
  modcompile_engine_free(engine);
  modcompile_context_free(nullptr);
  modcompile_engine_free(nullptr);
  return answer;
}

std::string threads(const Words& words) {
  const Tensors tensors(words, 4);
  const mc::Engine engine = mc::Engine::load(words.at(1), kOptions);
  std::vector<std::string> expected;
  mc::Context first = engine.make_context();
  for (const mc::Output& output : first.run(tensors.inputs)) expected.push_back(contents_of(output));
  std::vector<std::string> problems(std::stoul(words.at(2)));
  std::vector<std::thread> workers;
  for (std::string& problem : problems) {
    workers.emplace_back([&] {
      try {
        mc::Context context = engine.make_context();
        for (int left = std::stoi(words.at(3)); left > 0; --left) {
          const std::vector<mc::Output>& outputs = context.run(tensors.inputs);
          for (size_t i = 0; i < outputs.size(); ++i) {
            if (contents_of(outputs[i]) != expected[i]) problem = outputs[i].name + " differs";
          }
        }
      } catch (const std::exception& error) {
        problem = error.what();
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  for (const std::string& problem : problems) {
    if (!problem.empty()) return problem;
  }
  return "ok";
}

int64_t resident_kib() {
  int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages >> pages;
  return pages * sysconf(_SC_PAGESIZE) / 1024;
}

std::string cycles(const Words& words) {
  const Tensors tensors(words, 3);
  const int count = std::stoi(words.at(2));
  int64_t before = 0;
  // What the first tenth leaves behind, it leaves behind once.
  for (int done = 0; done < count; ++done) {
    if (done == count / 10) before = resident_kib();
    mc::Engine::load(words.at(1), kOptions).make_context().run(tensors.inputs);
  }
  return std::to_string(before) + " " + std::to_string(resident_kib());
}

std::string describe(const Words& words) {
  const mc::Engine engine = mc::Engine::load(words.at(1), kOptions);
  std::string text = engine.folder() + "\n";
  for (const auto* specs : {&engine.inputs(), &engine.outputs()}) {
    for (const mc::TensorSpec& spec : *specs) text += text_of(spec) + "\n";
  }
  for (const mc::RoutedBlock& block : engine.manifest().routed_blocks) {
    text += block.path + " " + block.capacity_ratio + " " + std::to_string(block.capacity) + "\n";
  }
  return text + engine.manifest().tokenizer;
}

std::string load(const Words& words) {
  mc::LoadOptions options = kOptions;
  for (size_t i = 2; i < words.size(); ++i) {
    const Words parts = split(words[i], '=');
    if (parts[0] == "stream") options.stream = &options;
    if (parts[0] == "graph") options.cuda_graph = true;
    if (parts[0] == "threads") options.intra_op_threads = std::stoi(parts.at(1));
    if (parts[0] == "device") options.device = std::stoi(parts.at(1));
    if (parts[0] == "provider") options.providers.push_back(parts.at(1));
  }
  mc::Engine::load(words.at(1), options);
  return "ok";
}

std::string answer(const Words& words) {
  try {
    const std::string& command = words.at(0);
    if (command == "sha256") return mc::sha256(read_whole(words.at(1)));
    if (command == "load") return load(words);
    if (command == "describe") return describe(words);
    if (command == "run" || command == "run-bodies") return run(words);
    if (command == "run-c") return run_c(words);
    if (command == "misuse-c") return misuse_c(words);
    if (command == "threads") return threads(words);
    if (command == "cycles") return cycles(words);
    return "no such command";
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) std::cout << answer(split(line, '\t')) << '\0' << std::flush;
}
