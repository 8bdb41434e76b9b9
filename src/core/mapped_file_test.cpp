#include "core/mapped_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "core/error.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

struct TemporaryFolder {
  fs::path path = fs::temp_directory_path() / ("krait-core-test-" + std::to_string(::getpid()));
  TemporaryFolder() { fs::create_directories(path); }
  ~TemporaryFolder() { fs::remove_all(path); }
};

TEST(MappedFile, ReadsWhatAtomicFileWrote) {
  TemporaryFolder folder;
  write_file_atomic(folder.path / "a.txt", "hello");
  EXPECT_EQ(MappedFile(folder.path / "a.txt").text(), "hello");
  write_file_atomic(folder.path / "empty", "");
  EXPECT_EQ(MappedFile(folder.path / "empty").size(), 0u);
}

TEST(MappedFile, SaysWhichFileIsMissing) {
  try {
    MappedFile file("/nonexistent/x.bin");
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("/nonexistent/x.bin"), std::string::npos);
  }
  EXPECT_THROW(MappedFile("/tmp"), Error);
}

TEST(MappedFile, DoesNotWaitForAPipesWriter) {
  TemporaryFolder folder;
  const fs::path pipe = folder.path / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THROW(MappedFile{pipe}, Error);
}

TEST(AtomicFile, WithoutCommitTheOldContentStays) {
  TemporaryFolder folder;
  const fs::path path = folder.path / "b.txt";
  write_file_atomic(path, "old");
  {
    AtomicFile file(path);
    file.write("new");
  }
  EXPECT_EQ(MappedFile(path).text(), "old");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path), fs::directory_iterator()), 1);
}

TEST(AtomicFile, WritesIntoAPipeAndThroughALink) {
  TemporaryFolder folder;
  const fs::path pipe = folder.path / "pipe", link = folder.path / "link", file = folder.path / "f";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  const int reader = ::open(pipe.c_str(), O_RDONLY | O_NONBLOCK);
  ASSERT_GE(reader, 0);
  write_file_atomic(pipe, "through");
  char text[16] = {};
  EXPECT_EQ(::read(reader, text, sizeof text), 7);
  EXPECT_STREQ(text, "through");
  ::close(reader);
  EXPECT_TRUE(fs::is_fifo(pipe));

  fs::create_symlink("f", link);
  for (const char* content : {"first", "second"}) {
    write_file_atomic(link, content);
    EXPECT_TRUE(fs::is_symlink(link));
    EXPECT_EQ(MappedFile(file).text(), content);
  }
  fs::permissions(file, fs::perms::owner_read | fs::perms::owner_write);
  write_file_atomic(file, "third");
  EXPECT_EQ(fs::status(file).permissions(), fs::perms::owner_read | fs::perms::owner_write);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path), fs::directory_iterator()), 3);
}

TEST(AtomicFile, AFullDiskIsAnError) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  fs::path target = "/dev/full";
  TemporaryFolder folder;
  // The temporary name is a link to /dev/full: every write to it fails with ENOSPC.
  fs::create_symlink(target, folder.path / ("c.txt.tmp-" + std::to_string(::getpid())));
  AtomicFile file(folder.path / "c.txt");
  EXPECT_THROW(file.write("x"), Error);
  EXPECT_FALSE(fs::exists(folder.path / "c.txt"));
}

}  // namespace
}  // namespace krait
