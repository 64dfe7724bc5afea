#include "library.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

#include "files.h"

namespace modcompile {

void* open_library(const std::string& content, const std::string& sha256, const LibraryKind& kind,
                   const std::string& where) {
  static std::mutex turn;
  static std::map<std::string, void*> opened;
  const std::lock_guard<std::mutex> lock(turn);
  void*& library = opened[sha256];
  if (library == nullptr) {
    const PrivateCopy copy(content, "library.so");
    library = dlopen(copy.path().c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      std::string found = dlerror();
      if (const std::string prefix = copy.path() + ": "; found.rfind(prefix, 0) == 0) found.erase(0, prefix.size());
      throw Error(ErrorKind::kRuntimeUnavailable, std::string(kind.name) + " does not load",
                  {"a shared library for this machine", found, where, kind.fix});
    }
  }
  return library;
}

}  // namespace modcompile
