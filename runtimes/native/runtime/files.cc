#include "files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <sstream>
#include <system_error>

#include "sha256.h"
#include "text.h"

namespace modcompile {
namespace {

namespace fs = std::filesystem;

constexpr size_t kPieceBytes = size_t{1} << 20;

Error not_regular(const std::string& path) {
  std::error_code ignored;
  return {ErrorKind::kIntegrity, "an entry of the folder is not a regular file",
          {"regular files and folders",
           fs::is_symlink(fs::symlink_status(path, ignored)) ? "a symbolic link" : "neither a file nor a folder",
           repr(path), "put the file itself there, or remove the entry"}};
}

Error not_read(const std::string& path, int error) {
  if (error == ELOOP) return not_regular(path);
  return {ErrorKind::kIntegrity, error == ENOENT ? "a file is missing" : "a file cannot be read",
          {"", std::strerror(error), path, ""}};
}

// A regular file that is open for reading.
class File {
 public:
  // Without O_NONBLOCK, opening a pipe that someone put in the file's place would wait for ever.
  explicit File(std::string path)
      : path_(std::move(path)), descriptor_(open(path_.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)) {
    if (descriptor_ < 0) throw not_read(path_, errno);
    struct stat status{};
    if (fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
      close(descriptor_);
      throw S_ISDIR(status.st_mode) ? not_read(path_, EISDIR) : not_regular(path_);
    }
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { close(descriptor_); }

  // At most that many bytes more; "" at the end.
  std::string read(size_t limit) {
    std::string piece(std::min(limit, kPieceBytes), '\0');
    ssize_t count;
    do {
      count = ::read(descriptor_, piece.data(), piece.size());
    } while (count < 0 && errno == EINTR);
    if (count < 0) throw not_read(path_, errno);
    piece.resize(static_cast<size_t>(count));
    return piece;
  }

 private:
  std::string path_;
  int descriptor_;
};

void list_into(const std::string& folder, const std::string& prefix, std::vector<std::string>& found) {
  for (const fs::directory_entry& entry : fs::directory_iterator(folder + "/" + prefix)) {
    const std::string name = prefix + entry.path().filename().string();
    const fs::file_status status = entry.symlink_status();
    if (fs::is_directory(status)) {
      list_into(folder, name + "/", found);
    } else if (fs::is_regular_file(status)) {
      found.push_back(name);
    } else {
      throw not_regular(folder + "/" + name);
    }
  }
}

}  // namespace

bool is_plain_path(const std::string& path) {
  for (const char c : path) {
    // A colon is a drive letter or an alternate stream on Windows.
    if (c == '\\' || c == ':' || static_cast<unsigned char>(c) < 32) return false;
  }
  std::istringstream parts(path + "/");
  for (std::string part; std::getline(parts, part, '/');) {
    if (part.empty() || part == "." || part == "..") return false;
  }
  return true;
}

std::vector<std::string> list_files(const std::string& folder) {
  std::vector<std::string> found;
  try {
    list_into(folder, "", found);
  } catch (const fs::filesystem_error& error) {
    throw Error(ErrorKind::kIntegrity, "a folder cannot be read", {"", error.code().message(), folder, ""});
  }
  std::sort(found.begin(), found.end());
  return found;
}

FileRecord hash_file(const std::string& path) {
  File file(path);
  Sha256 hash;
  uint64_t size = 0;
  for (std::string piece = file.read(kPieceBytes); !piece.empty(); piece = file.read(kPieceBytes)) {
    hash.update(piece.data(), piece.size());
    size += piece.size();
  }
  return {hash.hex(), size};
}

std::string read_file(const std::string& path, size_t limit_bytes) {
  File file(path);
  std::string content;
  for (std::string piece = file.read(limit_bytes + 1); !piece.empty();) {
    content += piece;
    if (content.size() > limit_bytes) {
      throw Error(ErrorKind::kIntegrity, "a file is larger than it can be",
                  {"at most " + std::to_string(limit_bytes) + " bytes", "", path, ""});
    }
    piece = file.read(limit_bytes + 1 - content.size());
  }
  return content;
}

PrivateCopy::PrivateCopy(const std::string& content, const char* name) {
  const char* given = std::getenv("TMPDIR");
  folder_ = std::string(given != nullptr && *given != '\0' ? given : "/tmp") + "/modcompile-XXXXXX";
  const auto failed = [this](const char* what) {
    return Error(ErrorKind::kOther, what, {"a folder for temporary files that may be written and has room",
                                           std::strerror(errno), folder_, "set TMPDIR"});
  };
  // Only this user may enter it.
  if (mkdtemp(folder_.data()) == nullptr) throw failed("a private folder cannot be made");
  path_ = folder_ + "/" + name;
  const int descriptor = open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  size_t written = 0;
  while (descriptor >= 0 && written < content.size()) {
    const ssize_t count = write(descriptor, content.data() + written, content.size() - written);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    written += static_cast<size_t>(count);
  }
  if (descriptor < 0 || close(descriptor) != 0 || written < content.size()) {
    const Error error = failed("a private copy of a file cannot be written");
    unlink(path_.c_str());
    rmdir(folder_.c_str());
    throw error;
  }
}

PrivateCopy::~PrivateCopy() {
  unlink(path_.c_str());
  rmdir(folder_.c_str());
}

}  // namespace modcompile
