// The folder of a training run, held by one process at a time.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "train/checkpoint.h"

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
  // Where to go on: as latest_checkpoint, and `warn` (none: nobody) hears when a run that is there
  // has none.
  std::optional<Checkpoint> newest_checkpoint(
      const std::function<void(const std::string&)>& warn) const;

 private:
  std::filesystem::path path_;
  int fd_ = -1;
};

}  // namespace krait
