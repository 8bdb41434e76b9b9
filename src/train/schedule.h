// Learning rate over a run: linear warmup from 0, then a cosine to min_lr or constant.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace krait {

struct Schedule {
  double lr = 0, min_lr = 0;
  bool cosine = true;
  double warmup = 0;  // length, in the unit of `at`'s arguments
  double total = 1;   // length of the run, in the same unit (steps or seconds)

  // done: how much of the run will be over after the step that this rate is for: step s of n is
  // at(s), so the last step of the warmup has the full rate and the last step of the run min_lr.
  double at(double done) const {
    if (done < warmup) return lr * done / warmup;
    if (!cosine) return lr;
    const double progress = std::clamp((done - warmup) / std::max(total - warmup, 1e-9), 0.0, 1.0);
    return min_lr + 0.5 * (lr - min_lr) * (1 + std::cos(3.14159265358979323846 * progress));
  }
};

}  // namespace krait
