// A libFuzzer target: manifests whose digest fits, and whose text is the fuzzer's. None may do more than be refused.
//
//   clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I include -I runtime \
//     tests/fuzz_manifest.cc runtime/{manifest,files,sha256,text}.cc -o fuzz_manifest
//   ./fuzz_manifest -max_len=8192 -max_total_time=300 CORPUS
//
// in runtimes/native, with CORPUS a folder of manifest.json files.

#include <cstdint>
#include <string>

#include "manifest.h"
#include "sha256.h"

namespace {

const std::string kBegin = "{\n  \"sha256\": \"", kEnd = "\",\n";
constexpr size_t kDigits = 64;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  // What a corpus's file has before its first field is put there anew.
  if (text.compare(0, kBegin.size(), kBegin) == 0) text.erase(0, kBegin.size() + kDigits + kEnd.size());
  std::string content = kBegin + std::string(kDigits, '0') + kEnd + text;
  content.replace(kBegin.size(), kDigits, modcompile::sha256(content));
  try {
    modcompile::parse_manifest(content, "manifest.json");
  } catch (const modcompile::Error&) {
    // Refused, which is all that it may be: any other exception ends the process.
  }
  return 0;
}
