// A file mapped read-only into memory. Pages are read when they are touched.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace krait {

class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(
      const std::filesystem::path& path);  // throws Error: missing, unreadable, not a regular file
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Writes a file so that it is either complete under its name or absent: temporary name in the same
// folder, fsync, rename, fsync of the folder. Throws Error (a full disk, no permission); the
// temporary file is removed then. A file that is replaced passes its permissions on. A symbolic
// link stays one, its target is what is written. What is there already and neither file nor folder
// (a pipe, a device) is written into as it is.
class AtomicFile {
 public:
  explicit AtomicFile(const std::filesystem::path& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  size_t position() const { return position_; }
  void commit();  // without it the destructor discards what was written

 private:
  [[noreturn]] void fail(const char* what);
  void discard();

  std::filesystem::path path_, temporary_;
  int fd_ = -1;
  size_t position_ = 0;
};

void write_file_atomic(const std::filesystem::path& path, std::string_view text);

// Throws Error where there is no such folder, or a file in its place.
void require_folder(const std::filesystem::path& path, const std::string& expected = "");

void sync_directory(const std::filesystem::path& directory);  // makes renames in it durable

}  // namespace krait
