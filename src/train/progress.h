// Text of a progress display. Printing is the caller's: a bar that rewrites its line on a terminal,
// plain lines elsewhere.
#pragma once

#include <cstdint>
#include <string>

namespace krait {

struct Progress {
  int64_t step = 0, steps = 0;        // steps 0: unknown, the run ends by time
  double elapsed_s = 0, seconds = 0;  // seconds: time limit, 0: none
  double loss = 0, val_loss = 0;      // val_loss 0: none yet
  double tokens_per_s = 0;

  double fraction() const;  // of the run that is over, 0 to 1
};

// "[########------------]  40 %  step 400/1000  loss 1.732 (val 1.801)  23.4k tok/s  ETA 1:05", at
// most `width` columns.
std::string progress_bar(const Progress& progress, int width = 80);
// The same without the bar.
std::string progress_line(const Progress& progress);

// Decides when to show the next one: each `interval_s` seconds at most, and the last in any case.
class ProgressTimer {
 public:
  explicit ProgressTimer(double interval_s) : interval_s_(interval_s) {}
  bool due(double now_s, bool last) {
    if (!last && now_s < next_s_) return false;
    next_s_ = now_s + interval_s_;
    return true;
  }

 private:
  double interval_s_, next_s_ = 0;
};

}  // namespace krait
