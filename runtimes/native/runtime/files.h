// Reading that trusts nothing: no links, nothing that is not a regular file, no path that could leave the folder.

#ifndef MODCOMPILE_RUNTIME_FILES_H_
#define MODCOMPILE_RUNTIME_FILES_H_

#include <string>
#include <vector>

#include "modcompile/engine.h"

namespace modcompile {

// Whether a path names a file below a folder, on every system.
bool is_plain_path(const std::string& path);

// The regular files below a folder as relative paths, sorted. Throws Error kIntegrity for an entry that is neither file
// nor folder.
std::vector<std::string> list_files(const std::string& folder);

// The SHA-256 and the size of a regular file. Throws Error kIntegrity where there is none.
FileRecord hash_file(const std::string& path);

// The contents of a regular file. Throws Error kIntegrity where there is none, or where it has more bytes than that.
std::string read_file(const std::string& path, size_t limit_bytes);

// A file with these contents that only this user can reach, until it is destroyed: of what is code, the very bytes that
// were checked are loaded.
class PrivateCopy {
 public:
  PrivateCopy(const std::string& content, const char* name);
  PrivateCopy(const PrivateCopy&) = delete;
  PrivateCopy& operator=(const PrivateCopy&) = delete;
  ~PrivateCopy();

  const std::string& path() const { return path_; }

 private:
  std::string folder_, path_;
};

}  // namespace modcompile

#endif  // MODCOMPILE_RUNTIME_FILES_H_
