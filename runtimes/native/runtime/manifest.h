// The manifest of a bundle, as modcompile/manifest.py writes it, and the check of a bundle's files against it.

#ifndef MODCOMPILE_RUNTIME_MANIFEST_H_
#define MODCOMPILE_RUNTIME_MANIFEST_H_

#include <string>

#include "modcompile/engine.h"

namespace modcompile {

// Reads a folder's manifest; its own digest is checked before it is parsed.
Manifest read_manifest(const std::string& folder);

// The same of a manifest's text. path is where it was, for messages.
Manifest parse_manifest(const std::string& content, const std::string& path);

// Compares every file of a folder with its manifest, sizes first; nothing of them is parsed.
void verify_files(const std::string& folder, const Manifest& manifest);

// The contents of a file, which are the very bytes whose hash was checked.
std::string read_verified(const std::string& folder, const Manifest& manifest, const std::string& name);

// Whether a version lies in the range of the manifest's runtime. Suffixes such as "+cu13" do not count.
bool runs_on(const Manifest& manifest, const std::string& version);

// Whether one version is another, or older.
bool is_at_most(const std::string& version, const std::string& other);

}  // namespace modcompile

#endif  // MODCOMPILE_RUNTIME_MANIFEST_H_
