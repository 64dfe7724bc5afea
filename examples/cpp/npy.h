// Reads arrays that numpy.save wrote.

#ifndef MODCOMPILE_EXAMPLES_NPY_H_
#define MODCOMPILE_EXAMPLES_NPY_H_

#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

#include "modcompile/engine.h"

struct Array {
  modcompile::DType dtype;
  std::vector<int64_t> shape;
  // Row after row.
  std::string bytes;
};

// Throws std::runtime_error for a file that is no array of numbers, little-endian and in C's order.
inline Array read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  const auto refuse = [&path](const char* why) { return std::runtime_error(path + ": " + why); };
  // The format's magic, its version, and the length of the header, in 2 bytes in version 1 and in 4 afterwards.
  if (content.size() < 12 || content.compare(0, 6, "\x93NUMPY") != 0) throw refuse("not a file of numpy.save");
  const size_t length_bytes = content[6] == 1 ? 2 : 4, start = 8 + length_bytes;
  size_t length = 0;
  for (size_t i = length_bytes; i-- > 0;) length = length << 8 | static_cast<unsigned char>(content[8 + i]);
  if (length > content.size() - start) throw refuse("cut short");
  const std::string header = content.substr(start, length);

  // {'descr': '<i8', 'fortran_order': False, 'shape': (2, 7), }
  static const std::regex form(
      R"(\{'descr': '[<|]([a-z]\d+)', 'fortran_order': False, 'shape': \(([\d, ]*)\), \}\s*)");
  std::smatch parts;
  if (!std::regex_match(header, parts, form)) throw refuse("not a plain array, little-endian and in C's order");
  static const std::map<std::string, const char*> names = {
      {"b1", "bool"},   {"u1", "uint8"}, {"i1", "int8"},   {"u2", "uint16"},  {"i2", "int16"},  {"u4", "uint32"},
      {"i4", "int32"},  {"u8", "uint64"}, {"i8", "int64"}, {"f2", "float16"}, {"f4", "float32"}, {"f8", "float64"}};
  const auto name = names.find(parts[1]);
  if (name == names.end()) throw refuse("of a dtype that engines do not have");

  Array array{modcompile::dtype_of(name->second).value(), {}, content.substr(start + length)};
  const std::string sizes = parts[2];
  static const std::regex number(R"(\d+)");
  uint64_t bytes = modcompile::size_of(array.dtype);
  for (std::sregex_iterator size(sizes.begin(), sizes.end(), number), end; size != end; ++size) {
    array.shape.push_back(std::stoll(size->str()));
    bytes *= static_cast<uint64_t>(array.shape.back());
  }
  if (bytes != array.bytes.size()) throw refuse("cut short");
  return array;
}

#endif  // MODCOMPILE_EXAMPLES_NPY_H_
