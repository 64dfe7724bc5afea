// run_bundle BUNDLE INPUTS EXPECTED [RUNS] [THREADS]: loads a bundle, runs it, compares, and says how long a run takes.
//
// INPUTS and EXPECTED are folders with a file NAME.npy for every input and output, as numpy.save writes them. Exits
// with 4 where an output is not the expected one, bit for bit, and otherwise with the code of the error it printed.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "modcompile/engine.h"
#include "npy.h"

namespace {

using Clock = std::chrono::steady_clock;

size_t bytes_of(const modcompile::Output& output) {
  size_t bytes = modcompile::size_of(output.dtype);
  for (const int64_t size : output.shape) bytes *= static_cast<size_t>(size);
  return bytes;
}

// Says how an output compares with what was expected, and whether they are the same bits.
bool compare(const modcompile::Output& output, const Array& expected) {
  std::cout << output.name << ": ";
  if (output.dtype != expected.dtype || output.shape != expected.shape) {
    std::cout << "another dtype or shape than expected\n";
    return false;
  }
  if (std::memcmp(output.data, expected.bytes.data(), bytes_of(output)) == 0) {
    std::cout << "as expected, bit for bit\n";
    return true;
  }
  std::cout << "not as expected";
  if (output.dtype == modcompile::DType::kFloat32) {
    const size_t count = bytes_of(output) / sizeof(float);
    std::vector<float> wanted(count), found(count);
    std::memcpy(wanted.data(), expected.bytes.data(), bytes_of(output));
    std::memcpy(found.data(), output.data, bytes_of(output));
    float largest = 0;
    for (size_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(found[i] - wanted[i]));
    std::cout << ": differs by up to " << largest;
  }
  std::cout << "\n";
  return false;
}

int run(const std::string& bundle, const std::string& inputs, const std::string& expected, int runs, int threads) {
  modcompile::LoadOptions options;
  options.intra_op_threads = threads;
  const modcompile::Engine engine = modcompile::Engine::load(bundle, options);

  std::vector<Array> arrays;
  for (const auto& spec : engine.inputs()) arrays.push_back(read_npy(inputs + "/" + spec.name + ".npy"));
  std::vector<modcompile::Input> given;
  for (size_t i = 0; i < arrays.size(); ++i) {
    given.push_back({engine.inputs()[i].name, arrays[i].dtype, arrays[i].shape, arrays[i].bytes.data()});
  }

  modcompile::Context context = engine.make_context();
  bool same = true;
  for (const auto& output : context.run(given)) {
    same = compare(output, read_npy(expected + "/" + output.name + ".npy")) && same;
  }

  std::vector<double> taken_ms;
  for (int i = 0; i < runs; ++i) {
    const auto start = Clock::now();
    context.run(given);
    taken_ms.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  if (!taken_ms.empty()) {
    std::sort(taken_ms.begin(), taken_ms.end());
    std::cout << "latency of " << runs << " runs: median " << taken_ms[taken_ms.size() / 2] << " ms, fastest "
              << taken_ms.front() << " ms, slowest " << taken_ms.back() << " ms\n";
  }
  return same ? 0 : 4;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4 || count > 6) {
    std::cerr << "usage: run_bundle BUNDLE INPUTS EXPECTED [RUNS] [THREADS]\n";
    return 2;
  }
  try {
    return run(arguments[1], arguments[2], arguments[3], count > 4 ? std::stoi(arguments[4]) : 20,
               count > 5 ? std::stoi(arguments[5]) : 0);
  } catch (const modcompile::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return static_cast<int>(error.kind());
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
