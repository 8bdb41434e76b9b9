// The folder of a training run, held by one process at a time.
#pragma once

#include <filesystem>

namespace krait {

// Makes the folder where it is missing and locks it until destroyed; the lock goes with the
// process. Throws Error.
class RunFolder {
 public:
  explicit RunFolder(const std::filesystem::path& path);
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  bool holds_a_run() const;  // metrics or checkpoints are there

 private:
  std::filesystem::path path_;
  int fd_ = -1;
};

}  // namespace krait
