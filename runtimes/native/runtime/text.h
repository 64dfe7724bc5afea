// How messages say names, shapes and bytes: as the Python package does.

#ifndef MODCOMPILE_RUNTIME_TEXT_H_
#define MODCOMPILE_RUNTIME_TEXT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "modcompile/engine.h"

namespace modcompile {

// "a, b"
std::string joined(const std::vector<std::string>& texts, const char* separator = ", ");
// The names or the texts of tensors, joined.
std::string names_of(const std::vector<TensorSpec>& specs);
std::string texts_of(const std::vector<TensorSpec>& specs, const char* separator);
// "(8, 256)", "(8,)", "()"
std::string text_of(const std::vector<int64_t>& shape);
// 'a text', with what cannot be printed escaped.
std::string repr(const std::string& text);
// b'bytes'
std::string repr_of_bytes(const std::string& bytes);
// "did you mean NAME?" where a name is alike enough, else "".
std::string nearest(const std::string& name, const std::vector<std::string>& names);

}  // namespace modcompile

#endif  // MODCOMPILE_RUNTIME_TEXT_H_
