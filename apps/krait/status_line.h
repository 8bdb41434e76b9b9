// Where a long command stands, on stderr: on a terminal a line that is rewritten, which makes room
// for lines that stay; else lines only.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <string>

#include "command.h"

namespace krait {

class StatusLine {
 public:
  explicit StatusLine(bool quiet) : terminal_(::isatty(STDERR_FILENO)), quiet_(quiet) {}

  // A line that stays, unless nobody wants to hear; and one for everybody.
  void line(const std::string& text) {
    if (!quiet_) warning(text);
  }
  void warning(const std::string& text) {
    clear();
    log_line(text);
  }
  void clear() {
    if (shown_) std::fputs("\r\033[K", stderr);
    shown_ = false;
  }

 protected:
  bool terminal() const { return terminal_; }
  bool quiet() const { return quiet_; }
  void show(const std::string& text) {
    if (!terminal_) return log_line(text);
    std::fprintf(stderr, "\r%s\033[K", text.c_str());
    shown_ = true;
  }

 private:
  bool terminal_, quiet_, shown_ = false;
};

}  // namespace krait
