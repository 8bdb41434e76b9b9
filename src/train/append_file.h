// A log file: whole records are appended with one write each, so a reader (or a crash) sees
// complete records but at most the last.
#pragma once

#include <filesystem>
#include <string_view>

namespace krait {

class AppendFile {
 public:
  explicit AppendFile(const std::filesystem::path& path);  // made when missing; throws Error
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  void append(std::string_view record);  // throws Error (a full disk)

 private:
  std::filesystem::path path_;
  int fd_ = -1;
};

}  // namespace krait
