#include "text.h"

#include <array>
#include <string_view>
#include <utility>

namespace modcompile {
namespace {

struct DTypeInfo {
  const char* name;
  size_t size;
};

// In the order of the enum.
constexpr std::array<DTypeInfo, 13> kDTypes = {{{"bool", 1}, {"uint8", 1}, {"int8", 1}, {"uint16", 2}, {"int16", 2},
                                                {"uint32", 4}, {"int32", 4}, {"uint64", 8}, {"int64", 8},
                                                {"float16", 2}, {"bfloat16", 2}, {"float32", 4}, {"float64", 8}}};

std::string text_of_error(const std::string& problem, const Details& details) {
  std::string text = problem;
  for (const auto& [name, value] : {std::pair{"expected", &details.expected}, {"found", &details.found},
                                    {"where", &details.where}, {"fix", &details.fix}}) {
    if (!value->empty()) text += std::string("\n  ") + name + ": " + *value;
  }
  return text;
}

std::string escaped(const std::string& bytes, char quote, bool ascii) {
  std::string text(1, quote);
  for (const char byte : bytes) {
    const auto code = static_cast<unsigned char>(byte);
    if (byte == quote || byte == '\\') {
      text += {'\\', byte};
    } else if (byte == '\n' || byte == '\r' || byte == '\t') {
      text += {'\\', byte == '\n' ? 'n' : byte == '\r' ? 'r' : 't'};
    } else if (code < 32 || code == 127 || (ascii && code > 127)) {
      text += {'\\', 'x', "0123456789abcdef"[code >> 4], "0123456789abcdef"[code & 15]};
    } else {
      text += byte;
    }
  }
  return text + quote;
}

char quote_for(const std::string& text) {
  return text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
}

// How many characters two texts share in order: those of the longest common piece, and of what is left and right of it
// (Ratcliff and Obershelp, as in Python's difflib).
size_t shared(std::string_view a, std::string_view b) {
  size_t longest = 0, at_a = 0, at_b = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < b.size(); ++j) {
      size_t length = 0;
      while (i + length < a.size() && j + length < b.size() && a[i + length] == b[j + length]) ++length;
      if (length > longest) longest = length, at_a = i, at_b = j;
    }
  }
  if (longest == 0) return 0;
  return longest + shared(a.substr(0, at_a), b.substr(0, at_b)) +
         shared(a.substr(at_a + longest), b.substr(at_b + longest));
}

}  // namespace

Error::Error(ErrorKind kind, const std::string& problem, Details details)
    : std::runtime_error(text_of_error(problem, details)),
      kind_(kind), problem_(problem), details_(std::move(details)) {}

Error::~Error() = default;

const char* name_of(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].name; }

size_t size_of(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].size; }

std::optional<DType> dtype_of(const std::string& name) {
  for (size_t i = 0; i < kDTypes.size(); ++i) {
    if (name == kDTypes[i].name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

std::string text_of(const TensorSpec& spec) {
  std::vector<std::string> dims;
  for (const Dim& dim : spec.shape) dims.push_back(dim.symbol.empty() ? std::to_string(dim.size) : dim.symbol);
  return spec.name + " " + name_of(spec.dtype) + " [" + joined(dims) + "]";
}

std::string joined(const std::vector<std::string>& texts, const char* separator) {
  std::string all;
  for (const std::string& text : texts) all += (&text == texts.data() ? "" : separator) + text;
  return all;
}

std::string names_of(const std::vector<TensorSpec>& specs) {
  std::vector<std::string> names;
  for (const TensorSpec& spec : specs) names.push_back(spec.name);
  return joined(names);
}

std::string texts_of(const std::vector<TensorSpec>& specs, const char* separator) {
  std::vector<std::string> texts;
  for (const TensorSpec& spec : specs) texts.push_back(text_of(spec));
  return joined(texts, separator);
}

std::string text_of(const std::vector<int64_t>& shape) {
  std::vector<std::string> sizes;
  for (const int64_t size : shape) sizes.push_back(std::to_string(size));
  return "(" + joined(sizes) + (shape.size() == 1 ? ",)" : ")");
}

std::string repr(const std::string& text) { return escaped(text, quote_for(text), false); }

std::string repr_of_bytes(const std::string& bytes) { return "b" + escaped(bytes, quote_for(bytes), true); }

std::string nearest(const std::string& name, const std::vector<std::string>& names) {
  const std::string* best = nullptr;
  double best_ratio = 0.6;
  for (const std::string& candidate : names) {
    const double ratio = 2.0 * static_cast<double>(shared(candidate, name)) /
                         static_cast<double>(candidate.size() + name.size());
    if (ratio > best_ratio || (ratio == best_ratio && (best == nullptr || candidate > *best))) {
      best = &candidate;
      best_ratio = ratio;
    }
  }
  return best == nullptr ? "" : "did you mean " + *best + "?";
}

}  // namespace modcompile
