// Does what tests of the C++ runtime ask for. A command is a line of words between tabs; an answer ends with a zero
// byte.
//
//   sha256 FILE                           the digest
//   load FOLDER [OPTION...]               "ok", or the error's text; OPTIONs are stream, graph, device=1, threads=2, provider=NAME
//   describe FOLDER                       inputs, outputs and what else the manifest says
//   run FOLDER TARGET TENSOR...           "ok" and the outputs in files TARGET/NAME, or the error's text
//   run-bodies FOLDER TARGET TENSOR...    the same without the custom-op library
//   run-c FOLDER TARGET TENSOR...         the same through the C API
//   again FOLDER TENSOR...                "ok" if what a context keeps between runs shows in none of them
//   misuse-c FOLDER                       what the C API says of null pointers
//   threads FOLDER COUNT RUNS TENSOR...   "ok" if runs on several threads give what one thread gives
//   cycles FOLDER COUNT TENSOR...         memory in KiB before and after loading and freeing the engine so often
//
// A TENSOR is as words.h has it.

#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
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

std::vector<std::string> results_of(mc::Context& context, const std::vector<mc::Input>& inputs,
                                    const std::vector<mc::Buffer>& buffers) {
  std::vector<std::string> results;
  for (const mc::Output& output : context.run(inputs, buffers)) results.push_back(contents_of(output));
  return results;
}

std::string refusal_of(mc::Context& context, const std::vector<mc::Input>& inputs,
                       const std::vector<mc::Buffer>& buffers) {
  try {
    context.run(inputs, buffers);
    return "not refused";
  } catch (const mc::Error& error) {
    return error.what();
  }
}

// A context is given, one after the other, the same tensors, other contents, places and sizes, and what does not fit.
// It must do each time what one does that was made just now.
std::string again(const Words& words) {
  const Tensors tensors(words, 2);
  const mc::Engine engine = mc::Engine::load(words.at(1), kOptions);
  const auto anew = [&engine](const std::vector<mc::Input>& inputs) {
    mc::Context context = engine.make_context();
    return results_of(context, inputs, {});
  };
  // Two copies of the inputs and of buffers, and contents in the reverse order.
  std::vector<std::string> memory;
  memory.reserve(4 * (tensors.inputs.size() + engine.outputs().size()));
  std::vector<mc::Input> places[2], reversed = tensors.inputs;
  std::vector<mc::Buffer> buffers[2];
  for (auto& copies : places) {
    for (const mc::Input& input : tensors.inputs) {
      memory.emplace_back(static_cast<const char*>(input.data), bytes_of(input.dtype, input.shape));
      copies.push_back({input.name, input.dtype, input.shape, memory.back().data()});
    }
  }
  for (mc::Input& input : reversed) {
    const auto* const data = static_cast<const char*>(input.data);
    std::string& bytes = memory.emplace_back();
    for (size_t at = bytes_of(input.dtype, input.shape); at > 0; at -= mc::size_of(input.dtype)) {
      bytes.append(data + at - mc::size_of(input.dtype), mc::size_of(input.dtype));
    }
    input.data = bytes.data();
  }
  mc::Context context = engine.make_context();
  for (auto& copies : buffers) {
    for (const mc::Output& output : context.run(places[0])) {
      std::string& bytes = memory.emplace_back(bytes_of(output.dtype, output.shape), '\0');
      copies.push_back({output.name, output.dtype, output.shape, bytes.data()});
    }
  }
  const std::vector<std::string> expected = anew(tensors.inputs), expected_reversed = anew(reversed);
  if (expected == expected_reversed) return "both contents give the same";

  for (const int outputs : {0, 1, 1, 2, 0, 2}) {
    for (const int inputs : {0, 0, 1, 0}) {
      for (const bool is_reversed : {false, true, false}) {
        const std::vector<mc::Input>& contents = is_reversed ? reversed : tensors.inputs;
        for (size_t i = 0; i < contents.size(); ++i) {
          std::memcpy(const_cast<void*>(places[inputs][i].data), contents[i].data,
                      bytes_of(contents[i].dtype, contents[i].shape));
        }
        const std::vector<mc::Buffer>& targets = outputs == 2 ? std::vector<mc::Buffer>() : buffers[outputs];
        for (const mc::Buffer& buffer : targets) std::memset(buffer.data, 0, bytes_of(buffer.dtype, buffer.shape));
        if (results_of(context, places[inputs], targets) != (is_reversed ? expected_reversed : expected)) {
          return "a later run differs";
        }
        for (size_t i = 0; i < targets.size(); ++i) {
          if (context.run(places[inputs], targets)[i].data != targets[i].data) return "the output is not in its buffer";
        }
      }
    }
  }

  // Fewer rows at the same place, where their number varies.
  if (!engine.inputs()[0].shape[0].symbol.empty()) {
    std::vector<mc::Input> fewer = places[0];
    for (mc::Input& input : fewer) input.shape[0] = 1;
    const std::vector<std::string> expected_fewer = anew(fewer);
    for (const bool is_fewer : {false, true, false}) {
      if (results_of(context, is_fewer ? fewer : places[0], {}) != (is_fewer ? expected_fewer : expected)) {
        return "a later run of another size differs";
      }
    }
  }

  std::vector<std::vector<mc::Input>> misfits(7, places[0]);
  misfits[0][0].data = nullptr;
  misfits[1][0].dtype = mc::DType::kFloat64;
  misfits[2][0].shape.back() += 1;
  misfits[3][0].memory = mc::Memory::kDevice;
  misfits[4][0].name += "?";
  misfits[5].pop_back();
  misfits[6].push_back(misfits[6][0]);
  for (const std::vector<mc::Input>& misfit : misfits) {
    mc::Context other = engine.make_context();
    const std::string refusal = refusal_of(context, misfit, buffers[0]);
    // TensorRT's engines take device memory, which is the host's where its stand-in runs them.
    if (refusal != refusal_of(other, misfit, buffers[0])) return "refused in another way: " + refusal;
    if (refusal == "not refused" && &misfit != &misfits[3]) return refusal;
    if (results_of(context, places[0], buffers[0]) != expected) return "a run after one that was refused differs";
  }
  std::vector<mc::Buffer> no_buffers = buffers[0];
  no_buffers[0].data = nullptr;
  const std::string refusal = refusal_of(context, places[0], no_buffers);
  return refusal.find(" has no data\n") == std::string::npos ? "a buffer without data: " + refusal : "ok";
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
#ifdef __GLIBC__
  // Pages that malloc keeps for later are nobody's: how many there are depends on how threads took turns.
  malloc_trim(0);
#endif
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
    if (command == "again") return again(words);
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
