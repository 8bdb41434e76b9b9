#include "train/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace krait {

RunFolder::RunFolder(const std::filesystem::path& path) : path_(path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) throw Error("cannot create the folder: " + error.message(), path.string());
  fd_ = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd_ < 0)
    throw Error(std::string("cannot open the folder: ") + std::strerror(errno), path.string());
  if (::flock(fd_, LOCK_EX | LOCK_NB) != 0 &&
      errno == EWOULDBLOCK) {  // other failures: a file system without locks
    ::close(fd_);
    throw Error("another process trains in this folder", path.string());
  }
}

RunFolder::~RunFolder() { ::close(fd_); }

bool RunFolder::holds_a_run() const {
  return std::filesystem::exists(path_ / "metrics.jsonl") || !list_checkpoints(path_).empty();
}

std::optional<Checkpoint> RunFolder::newest_checkpoint(
    const std::function<void(const std::string&)>& warn) const {
  std::optional<Checkpoint> newest = latest_checkpoint(path_, warn);
  if (!newest && warn && holds_a_run())
    warn("no intact checkpoint in " + path_.string() + ": training starts anew");
  return newest;
}

}  // namespace krait
