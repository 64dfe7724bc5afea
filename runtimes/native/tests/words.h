// The words of the programs that tests drive.
//
// A tensor is NAME:DTYPE:SIZES:FILE, SIZES as in 8x256; FILE is "null" for a null pointer, "zeros" for zeros, "device"
// for what is said to be device memory. Where it begins with ">", it is a buffer for an output.

#ifndef MODCOMPILE_TESTS_WORDS_H_
#define MODCOMPILE_TESTS_WORDS_H_

#include <cstdint>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "modcompile/engine.h"

using Words = std::vector<std::string>;

inline Words split(const std::string& text, char separator) {
  Words words;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, separator);) words.push_back(word);
  return words;
}

inline std::string read_whole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline size_t bytes_of(modcompile::DType dtype, const std::vector<int64_t>& shape) {
  size_t bytes = modcompile::size_of(dtype);
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  return bytes;
}

// The tensors of a command, and their memory.
struct Tensors {
  Tensors(const Words& words, size_t first) {
    for (size_t i = first; i < words.size(); ++i) {
      const Words parts = split(words[i], ':');
      std::vector<int64_t> shape;
      for (const std::string& size : split(parts.at(2), 'x')) shape.push_back(std::stoll(size));
      const modcompile::DType dtype = modcompile::dtype_of(parts[1]).value();
      std::string& memory = *memory_.emplace_back(std::make_unique<std::string>());
      const modcompile::Memory where = parts.at(3) == "device" ? modcompile::Memory::kDevice : modcompile::Memory::kHost;
      if (parts[3] == "zeros" || parts[3] == "device") {
        memory.resize(bytes_of(dtype, shape));
      } else if (parts[3] != "null") {
        memory = read_whole(parts[3]);
      }
      void* data = parts[3] == "null" ? nullptr : memory.data();
      if (parts[0][0] == '>') {
        buffers.push_back({parts[0].substr(1), dtype, shape, data, where});
      } else {
        inputs.push_back({parts[0], dtype, shape, data, where});
      }
    }
  }

  std::vector<modcompile::Input> inputs;
  std::vector<modcompile::Buffer> buffers;

 private:
  std::vector<std::unique_ptr<std::string>> memory_;
};

#endif  // MODCOMPILE_TESTS_WORDS_H_
