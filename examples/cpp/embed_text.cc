// embed_text BUNDLE LIBRARY: reads a sentence a line, and prints for each its embedding, a unit vector, a line.
//
// BUNDLE is an engine of static shapes with a tokenizer.onnx within, as examples/tokenizer_onnx.py and `modcompile
// package` make it; LIBRARY is onnxruntime-extensions', whose operator BertTokenizer the tokenizer is. Its releases for
// C++ and Java have one; that of the Python package needs libpython, which LD_PRELOAD gives it.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "modcompile/engine.h"

// B batch  S rows  D model dim

namespace {

using Ids = std::map<std::string, std::vector<int64_t>>;

// What makes an engine's inputs, by their names, of a text.
class Tokenizer {
 public:
  Tokenizer(const std::string& model, const std::string& library)
      : env_(ORT_LOGGING_LEVEL_FATAL, "tokenizer"), session_(env_, model.c_str(), options(library)) {
    const Ort::AllocatorWithDefaultOptions allocator;
    input_ = session_.GetInputNameAllocated(0, allocator).get();
    for (size_t i = 0; i < session_.GetOutputCount(); ++i) {
      outputs_.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
    }
  }

  Ids operator()(const std::string& text) {
    const Ort::AllocatorWithDefaultOptions allocator;
    const int64_t shape[] = {1};
    Ort::Value given = Ort::Value::CreateTensor(allocator, shape, 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_STRING);
    const char* const texts[] = {text.c_str()};
    given.FillStringTensor(texts, 1);
    const char* const inputs[] = {input_.c_str()};
    std::vector<const char*> names;
    for (const std::string& name : outputs_) names.push_back(name.c_str());
    const auto values = session_.Run(Ort::RunOptions{nullptr}, inputs, &given, 1, names.data(), names.size());
    Ids ids;
    for (size_t i = 0; i < values.size(); ++i) {
      const auto* const data = values[i].GetTensorData<int64_t>();
      ids[outputs_[i]].assign(data, data + values[i].GetTensorTypeAndShapeInfo().GetElementCount());
    }
    return ids;
  }

 private:
  static Ort::SessionOptions options(const std::string& library) {
    Ort::SessionOptions options;
    options.RegisterCustomOpsLibrary(library.c_str());
    return options;
  }

  Ort::Env env_;
  Ort::Session session_;
  std::string input_;
  std::vector<std::string> outputs_;
};

class Embedder {
 public:
  Embedder(const std::string& bundle, const std::string& library)
      : engine_(modcompile::Engine::load(bundle)), context_(engine_.make_context()),
        tokenizer_(bundle + "/" + engine_.manifest().tokenizer, library) {
    const auto& shape = engine_.inputs().at(0).shape;
    if (shape.size() != 2 || shape[0].size == 0 || shape[1].size == 0) {
      throw std::runtime_error("the engine is not of static shapes: build it with --shape input_ids=8x128");
    }
    rows_ = static_cast<size_t>(shape[0].size);
    length_ = static_cast<size_t>(shape[1].size);
    for (const auto& spec : engine_.inputs()) tensors_[spec.name].resize(rows_ * length_);
  }

  size_t rows() const { return rows_; }

  // At most B texts; longer ones are cut to S. A unit vector of D for each.
  std::vector<std::vector<float>> operator()(const std::vector<std::string>& texts) {
    for (auto& [name, values] : tensors_) std::fill(values.begin(), values.end(), 0);  // [B, S]
    std::vector<size_t> counts;
    for (size_t row = 0; row < texts.size(); ++row) {
      Ids ids = tokenizer_(texts[row]);
      for (auto& [name, values] : tensors_) {
        std::vector<int64_t>& found = ids[name];
        if (found.empty()) throw std::runtime_error("the tokenizer does not make " + name);
        // The separator stays last.
        if (found.size() > length_) found.erase(found.end() - 1 - static_cast<std::ptrdiff_t>(found.size() - length_),
                                                found.end() - 1);
        std::copy(found.begin(), found.end(), values.begin() + static_cast<std::ptrdiff_t>(row * length_));
        if (name == "input_ids") counts.push_back(found.size());
      }
    }
    std::vector<modcompile::Input> inputs;
    for (const auto& spec : engine_.inputs()) {
      inputs.push_back({spec.name, spec.dtype, {static_cast<int64_t>(rows_), static_cast<int64_t>(length_)},
                        tensors_[spec.name].data()});
    }
    const modcompile::Output& hidden = context_.run(inputs).at(0);  // [B, S, D]
    if (hidden.dtype != modcompile::DType::kFloat32 || hidden.shape.size() != 3) {
      throw std::runtime_error("the engine's first output is not [B, S, D] in float32");
    }
    const auto width = static_cast<size_t>(hidden.shape[2]);
    std::vector<std::vector<float>> vectors;
    for (size_t row = 0; row < texts.size(); ++row) {
      const float* const first = static_cast<const float*>(hidden.data) + row * length_ * width;
      std::vector<double> sums(width);
      for (size_t i = 0; i < counts[row] * width; ++i) sums[i % width] += first[i];
      double square = 0;
      for (const double sum : sums) square += sum * sum;
      std::vector<float>& vector = vectors.emplace_back();
      for (const double sum : sums) vector.push_back(static_cast<float>(sum / std::sqrt(square)));
    }
    return vectors;
  }

 private:
  modcompile::Engine engine_;
  modcompile::Context context_;
  Tokenizer tokenizer_;
  size_t rows_ = 0, length_ = 0;
  std::map<std::string, std::vector<int64_t>> tensors_;
};

int embed(const std::string& bundle, const std::string& library) {
  Embedder embedder(bundle, library);
  std::cout << std::setprecision(9);
  std::vector<std::string> texts;
  const auto flush = [&] {
    if (texts.empty()) return;
    for (const auto& vector : embedder(texts)) {
      for (size_t i = 0; i < vector.size(); ++i) std::cout << (i == 0 ? "" : " ") << vector[i];
      std::cout << "\n";
    }
    texts.clear();
  };
  for (std::string line; std::getline(std::cin, line);) {
    texts.push_back(line);
    if (texts.size() == embedder.rows()) flush();
  }
  flush();
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: embed_text BUNDLE LIBRARY < SENTENCES\n";
    return 2;
  }
  try {
    return embed(arguments[1], arguments[2]);
  } catch (const modcompile::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return static_cast<int>(error.kind());
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
