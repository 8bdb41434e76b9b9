// Runs the command line as a user does.
#pragma once

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <string>
#include <vector>

#include "train/test_folder.h"

namespace krait {

struct ProgramResult {
  int status = -1;  // exit status; 128 + number where a signal ended it
  std::string out, err;
  int64_t peak_bytes = 0;  // resident
};

struct ProgramOptions {
  std::string input;           // standard input
  std::string output_to = {};  // standard output goes to this file instead
  int interrupt_after_ms = 0;  // 0: never; else SIGINT after so long
};

inline ProgramResult run_krait(const std::vector<std::string>& arguments,
                               const ProgramOptions& options = {}) {
  const TestFolder folder;
  const std::string in = folder.file("in", options.input), err = folder.file("err", "");
  const std::string out = options.output_to.empty() ? folder.file("out", "") : options.output_to;
  std::vector<char*> argv = {const_cast<char*>(KRAIT_CLI)};
  for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    if (::dup2(::open(in.c_str(), O_RDONLY), 0) < 0 ||
        ::dup2(::open(out.c_str(), O_WRONLY), 1) < 0 ||
        ::dup2(::open(err.c_str(), O_WRONLY), 2) < 0)
      ::_exit(126);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  if (options.interrupt_after_ms > 0) {
    ::usleep(static_cast<useconds_t>(options.interrupt_after_ms) * 1000);
    ::kill(child, SIGINT);
  }
  ProgramResult result;
  int status = 0;
  rusage usage = {};
  ::wait4(child, &status, 0, &usage);
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result.peak_bytes = int64_t{usage.ru_maxrss} * 1024;
  if (options.output_to.empty()) result.out = read_text(out);
  result.err = read_text(err);
  return result;
}

}  // namespace krait
