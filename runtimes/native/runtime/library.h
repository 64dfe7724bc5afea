// Libraries that a bundle holds: code, which is loaded from a private copy of bytes that were checked.

#ifndef MODCOMPILE_RUNTIME_LIBRARY_H_
#define MODCOMPILE_RUNTIME_LIBRARY_H_

#include <string>

namespace modcompile {

// What messages call a library, and what to do where it cannot be used.
struct LibraryKind {
  const char* name;
  const char* fix;
};

// The handle of a library, which is loaded once for its contents and then stays: what a back end gets from it is made
// to last as long as the process. Throws Error kRuntimeUnavailable where it does not load.
void* open_library(const std::string& content, const std::string& sha256, const LibraryKind& kind,
                   const std::string& where);

}  // namespace modcompile

#endif  // MODCOMPILE_RUNTIME_LIBRARY_H_
