#include "manifest.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "files.h"
#include "sha256.h"
#include "text.h"

namespace modcompile {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int kFormat = 1;
constexpr const char* kName = "manifest.json";
constexpr size_t kLimitBytes = size_t{4} << 20;
// Deeper than any manifest: the options of a pass may be nested.
constexpr int kLimitDepth = 64;

// The file begins with this, 64 digits and kSealEnd; the digits are the SHA-256 of the file with zeros in their place.
constexpr std::string_view kSealBegin = "{\n  \"sha256\": \"";
constexpr std::string_view kSealEnd = "\",\n";
constexpr size_t kDigits = 64;

bool is_digest(std::string_view text) {
  return text.size() == kDigits && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

Error integrity(const char* problem, Details details) {
  return {ErrorKind::kIntegrity, problem, std::move(details)};
}

Error altered(const std::string& path, const std::string& expected, const std::string& found) {
  return integrity("a file of the engine is not the one that was written: truncated or edited",
                   {expected, found, path, "copy the engine folder again, or build the engine again"});
}

// Throws unless the file's digits are its digest.
void check_seal(const std::string& content, const std::string& path) {
  const std::string_view text = content;
  const auto begin = kSealBegin.size(), end = begin + kDigits;
  const bool has_form = text.size() >= end + kSealEnd.size() && text.substr(0, begin) == kSealBegin &&
                        is_digest(text.substr(begin, kDigits)) && text.substr(end, kSealEnd.size()) == kSealEnd;
  std::string blank = content;
  std::string digest;
  if (has_form) {
    blank.replace(begin, kDigits, kDigits, '0');
    digest = sha256(blank);
    if (text.substr(begin, kDigits) == digest) return;
  }
  throw integrity("the manifest is damaged: truncated, edited or not a manifest",
                  {has_form ? "sha256 " + content.substr(begin, kDigits) : "a file that begins with its \"sha256\"",
                   has_form ? "sha256 " + digest : repr_of_bytes(content.substr(0, 40)), path,
                   "copy the engine folder again, or build the engine again"});
}

Json parse(const std::string& content, const std::string& path) {
  // Two readers may take different ones of two equal keys.
  std::vector<std::set<std::string>> keys;
  const auto check = [&keys](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kLimitDepth) throw std::invalid_argument("it is nested too deep");
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second) {
      throw std::invalid_argument("a key appears twice");
    }
    return true;
  };
  const auto refuse = [&path](const std::string& found) {
    return integrity("the manifest is not one this package wrote", {"", found, path, ""});
  };
  try {
    return Json::parse(content, check);
  } catch (const Json::parse_error& error) {
    // Its own words repeat bytes that may be no text.
    throw refuse("no JSON at byte " + std::to_string(error.byte));
  } catch (const std::exception& error) {
    throw refuse(error.what());
  }
}

// A value of the manifest and where it is, for messages. Fields that are not known here are left alone: one that would
// change how an engine is run comes with a new format.
class Value {
 public:
  Value(const Json& json, std::string place, const std::string& path)
      : json_(json), place_(std::move(place)), path_(path) {}

  [[noreturn]] void refuse(const std::string& expected) const {
    // In ASCII, which may be cut anywhere.
    const std::string found = json_.dump(-1, ' ', true).substr(0, 200);
    throw integrity("the manifest is not one this package wrote", {expected, place_ + ": " + found, path_, ""});
  }

  bool has(const char* key) const { return json_.is_object() && json_.contains(key) && !json_.at(key).is_null(); }

  Value operator[](const std::string& key) const {
    if (!json_.is_object() || !json_.contains(key)) refuse("the field " + key);
    return {json_.at(key), place_.empty() ? key : place_ + "." + key, path_};
  }

  std::vector<Value> items() const {
    if (!json_.is_array()) refuse("an array");
    std::vector<Value> values;
    for (size_t i = 0; i < json_.size(); ++i) values.emplace_back(json_[i], place_ + "." + std::to_string(i), path_);
    return values;
  }

  std::map<std::string, Value> fields() const {
    if (!json_.is_object()) refuse("an object");
    std::map<std::string, Value> values;
    for (const auto& [key, value] : json_.items()) values.emplace(key, Value(value, place_ + "." + key, path_));
    return values;
  }

  std::string text() const {
    if (!json_.is_string() || json_.get_ref<const std::string&>().empty()) refuse("a text");
    return json_.get<std::string>();
  }

  std::string one_of(const std::vector<std::string>& words) const {
    const std::string word = text();
    if (std::find(words.begin(), words.end(), word) == words.end()) refuse(joined(words, " or "));
    return word;
  }

  std::string plain_path() const {
    const std::string path = text();
    if (!is_plain_path(path)) refuse("a plain path below the folder");
    return path;
  }

  std::string version() const {
    const std::string version = text();
    bool digit = false;
    for (const char c : version) {
      if ((c < '0' || c > '9') && (c != '.' || !digit)) refuse("a version such as 1.24");
      digit = c != '.';
    }
    if (!digit) refuse("a version such as 1.24");
    return version;
  }

  int64_t number(int64_t least) const {
    // A number beyond int64_t is unsigned here.
    if (!json_.is_number_integer() || (json_.is_number_unsigned() && json_.get<uint64_t>() > INT64_MAX) ||
        json_.get<int64_t>() < least) {
      refuse("a number, at least " + std::to_string(least));
    }
    return json_.get<int64_t>();
  }

  Dim dim() const {
    if (json_.is_string()) return {0, text()};
    return {number(1), ""};
  }

 private:
  const Json& json_;
  std::string place_;
  const std::string& path_;
};

std::vector<TensorSpec> read_specs(const Value& values) {
  std::vector<TensorSpec> specs;
  std::set<std::string> names;
  for (const Value& value : values.items()) {
    const std::optional<DType> dtype = dtype_of(value["dtype"].text());
    if (!dtype) value["dtype"].refuse("a dtype such as float32");
    std::vector<Dim> shape;
    for (const Value& dim : value["shape"].items()) shape.push_back(dim.dim());
    specs.push_back({value["name"].text(), *dtype, std::move(shape)});
    if (!names.insert(specs.back().name).second) value.refuse("a name of its own");
  }
  return specs;
}

std::vector<RoutedBlock> read_blocks(const Value& values) {
  std::vector<RoutedBlock> blocks;
  for (const Value& value : values.items()) {
    RoutedBlock block{value["path"].text(), value["capacity_ratio"].text(), value["rows"].dim(), 0};
    if (value.has("capacity")) block.capacity = value["capacity"].number(1);
    if ((block.capacity > 0) != block.rows.symbol.empty() || (block.capacity > 0 && block.capacity > block.rows.size)) {
      value.refuse("a capacity of 1 to rows where rows is a number, else none");
    }
    blocks.push_back(std::move(block));
  }
  return blocks;
}

Manifest read(const Value& value) {
  Manifest manifest;
  manifest.modcompile_version = value["modcompile_version"].text();
  manifest.runtime = value["runtime"].one_of({"ort", "tensorrt", "tensorrt-rtx", "aoti"});
  manifest.runtime_version = value["runtime_version"].text();
  const Value range = value["runtime_range"];
  manifest.runtime_minimum = range["minimum"].version();
  if (range.has("below")) manifest.runtime_below = range["below"].version();
  manifest.precision = value["precision"].one_of({"fp32", "fp16", "bf16"});
  manifest.inputs = read_specs(value["inputs"]);
  manifest.outputs = read_specs(value["outputs"]);
  if (manifest.outputs.empty()) value["outputs"].refuse("an output");
  if (value.has("routed_blocks")) manifest.routed_blocks = read_blocks(value["routed_blocks"]);
  if (value.has("providers")) {
    for (const Value& provider : value["providers"].items()) manifest.providers.push_back(provider.text());
  }
  if (value.has("target")) {
    for (const auto& [key, text] : value["target"].fields()) manifest.target[key] = text.text();
  }
  for (const auto& [name, record] : value["files"].fields()) {
    if (!is_plain_path(name) || name == kName) record.refuse("a plain path below the folder");
    const std::string digest = record["sha256"].text();
    if (!is_digest(digest)) record["sha256"].refuse("64 digits");
    manifest.files[name] = {digest, static_cast<uint64_t>(record["size"].number(0))};
  }
  manifest.entry = value["entry"].plain_path();
  if (value.has("tokenizer")) manifest.tokenizer = value["tokenizer"].plain_path();
  for (const std::string& name : {manifest.entry, manifest.tokenizer}) {
    if (!name.empty() && manifest.files.count(name) == 0) value["files"].refuse("the file " + name);
  }
  return manifest;
}

std::vector<uint64_t> numbers_of(const std::string& version) {
  std::vector<uint64_t> numbers;
  for (size_t at = 0; at < version.size() && version[at] >= '0' && version[at] <= '9';) {
    uint64_t number = 0;
    for (; at < version.size() && version[at] >= '0' && version[at] <= '9'; ++at) {
      number = number * 10 + static_cast<uint64_t>(version[at] - '0');
    }
    numbers.push_back(number);
    if (at < version.size() && version[at] == '.') ++at;
    else break;
  }
  // 1.24 and 1.24.0 are one version.
  while (!numbers.empty() && numbers.back() == 0) numbers.pop_back();
  return numbers;
}

}  // namespace

Manifest read_manifest(const std::string& folder) {
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) {
    throw Error(ErrorKind::kUsage, "there is no engine folder at this path",
                {std::string("a folder with ") + kName, fs::exists(folder, ignored) ? "a file" : "nothing", folder,
                 "build one with modcompile.build_engine or `modcompile build`"});
  }
  const std::string path = folder + "/" + kName;
  const auto holds = [&](const char* name) { return fs::exists(fs::path(folder) / name, ignored); };
  if (!holds(kName) && (holds("modcompile.json") || holds("config.json"))) {
    throw Error(ErrorKind::kUsage, "the folder holds a model, and no engine",
                {std::string("a folder with ") + kName, folder, folder,
                 "build one with modcompile.build_engine or `modcompile build`"});
  }
  return parse_manifest(read_file(path, kLimitBytes), path);
}

Manifest parse_manifest(const std::string& content, const std::string& path) {
  check_seal(content, path);
  const Json json = parse(content, path);
  const Value value(json, "", path);
  // Of a newer format nothing else is known.
  if (const int64_t format = value["format_version"].number(1); format > kFormat) {
    throw Error(ErrorKind::kRuntimeUnavailable, "the engine was written in a newer format",
                {"format " + std::to_string(kFormat) + " or older", "format " + std::to_string(format), path,
                 "pip install --upgrade modcompile, or build the engine again"});
  }
  return read(value);
}

void verify_files(const std::string& folder, const Manifest& manifest) {
  std::vector<std::string> present = list_files(folder), listed, differing;
  present.erase(std::remove(present.begin(), present.end(), kName), present.end());
  for (const auto& [name, record] : manifest.files) listed.push_back(name);
  std::set_symmetric_difference(present.begin(), present.end(), listed.begin(), listed.end(),
                                std::back_inserter(differing));
  if (!differing.empty()) {
    const bool missing = manifest.files.count(differing[0]) > 0;
    throw integrity(missing ? "a file of the engine is missing" : "the engine folder holds a foreign file",
                    {"the files that the manifest lists, no others", repr(differing[0]), folder,
                     missing ? "copy the engine folder again" : "move the file out of the folder"});
  }
  for (const auto& [name, record] : manifest.files) {
    std::error_code error;
    const uint64_t size = fs::file_size(folder + "/" + name, error);
    if (!error && size != record.size) {
      throw altered(folder + "/" + name, std::to_string(record.size) + " bytes", std::to_string(size) + " bytes");
    }
  }
  for (const auto& [name, record] : manifest.files) {
    const FileRecord found = hash_file(folder + "/" + name);
    if (found.sha256 != record.sha256 || found.size != record.size) {
      throw altered(folder + "/" + name, "sha256 " + record.sha256, "sha256 " + found.sha256);
    }
  }
}

std::string read_verified(const std::string& folder, const Manifest& manifest, const std::string& name) {
  const std::string path = folder + "/" + name;
  const FileRecord& record = manifest.files.at(name);
  std::string content = read_file(path, record.size);
  const std::string digest = sha256(content);
  if (digest != record.sha256) throw altered(path, "sha256 " + record.sha256, "sha256 " + digest);
  return content;
}

bool runs_on(const Manifest& manifest, const std::string& version) {
  const std::vector<uint64_t> found = numbers_of(version);
  return numbers_of(manifest.runtime_minimum) <= found &&
         (manifest.runtime_below.empty() || found < numbers_of(manifest.runtime_below));
}

bool is_at_most(const std::string& version, const std::string& other) {
  return numbers_of(version) <= numbers_of(other);
}

}  // namespace modcompile
