// SHA-256 (FIPS 180-4). Own code: sixty lines save every program that ships an engine a version of libcrypto to match.
// A hash of 90 MB of weights takes a fraction of a second, once a load.

#ifndef MODCOMPILE_RUNTIME_SHA256_H_
#define MODCOMPILE_RUNTIME_SHA256_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace modcompile {

class Sha256 {
 public:
  void update(const void* data, size_t size);
  // The digest in lower-case hex. Nothing may be added afterwards.
  std::string hex();

 private:
  void compress(const unsigned char* block);

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> block_{};
  // Bytes so far.
  uint64_t size_ = 0;
};

std::string sha256(const std::string& content);

}  // namespace modcompile

#endif  // MODCOMPILE_RUNTIME_SHA256_H_
