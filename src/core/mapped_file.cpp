#include "core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/error.h"

namespace krait {
namespace {

[[noreturn]] void fail_io(const char* what, const std::filesystem::path& path) {
  throw Error(std::string(what) + ": " + std::strerror(errno), path.string());
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) : path_(path) {
  // Of a pipe without a writer, open() would wait for one.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail_io("cannot open", path);
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    throw Error("not a regular file", path.string());
  }
  size_ = static_cast<size_t>(info.st_size);
  if (size_ > 0) {
    void* p = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    const int error = errno;
    ::close(fd);
    errno = error;
    if (p == MAP_FAILED) fail_io("cannot map", path);
    data_ = static_cast<const std::byte*>(p);
  } else {
    ::close(fd);
  }
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

namespace {

// What a symbolic link leads to, there or not.
std::filesystem::path target_of(std::filesystem::path path) {
  namespace fs = std::filesystem;
  std::error_code error;
  for (int i = 0; i < 40 && fs::is_symlink(fs::symlink_status(path, error)); ++i) {
    const fs::path target = fs::read_symlink(path, error);
    if (error) break;
    path = path.parent_path() / target;  // an absolute target replaces it
  }
  return path;
}

}  // namespace

AtomicFile::AtomicFile(const std::filesystem::path& path) : path_(path) {
  struct stat there = {};
  const bool exists = ::stat(path.c_str(), &there) == 0;
  const bool special = exists && !S_ISREG(there.st_mode) && !S_ISDIR(there.st_mode);
  if (special) {
    fd_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
  } else {
    path_ = target_of(path);
    temporary_ = path_.string() + ".tmp-" + std::to_string(::getpid());
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd_ >= 0 && exists && S_ISREG(there.st_mode)) ::fchmod(fd_, there.st_mode & 07777);
  }
  if (fd_ < 0) {
    temporary_.clear();
    fail_io("cannot create", path_);
  }
}

AtomicFile::~AtomicFile() { discard(); }

void AtomicFile::discard() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
  fd_ = -1;
  temporary_.clear();
}

void AtomicFile::fail(const char* what) {
  const int error = errno;
  discard();
  errno = error;
  fail_io(what, path_);
}

void AtomicFile::write(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::write(fd_, p, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail("cannot write");
    p += n;
    bytes -= static_cast<size_t>(n);
    position_ += static_cast<size_t>(n);
  }
}

void AtomicFile::commit() {
  if (!temporary_.empty() && ::fsync(fd_) != 0) fail("cannot write");
  const int fd = std::exchange(fd_, -1);
  if (::close(fd) != 0) fail("cannot write");
  if (temporary_.empty()) return;
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("cannot rename into place");
  temporary_.clear();
  sync_directory(path_.parent_path());
}

void write_file_atomic(const std::filesystem::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void require_folder(const std::filesystem::path& path, const std::string& expected) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) return;
  throw Error(std::filesystem::exists(path, ignored) ? "not a folder" : "no such folder",
              path.string(), expected);
}

void sync_directory(const std::filesystem::path& directory) {
  const std::filesystem::path name = directory.empty() ? "." : directory;
  const int fd = ::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);  // some file systems refuse it for folders; the data itself is already safe
  ::close(fd);
}

}  // namespace krait
