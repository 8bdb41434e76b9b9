#include "train/progress.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace krait {
namespace {

std::string duration(double seconds) {
  const auto s = static_cast<long>(std::clamp(seconds, 0.0, 1e9) + 0.5);
  char text[32];
  if (s >= 3600) {
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
  } else {
    std::snprintf(text, sizeof text, "%ld:%02ld", s / 60, s % 60);
  }
  return text;
}

std::string rate(double per_s) {
  char text[32];
  if (per_s >= 1e6) {
    std::snprintf(text, sizeof text, "%.2fM", per_s / 1e6);
  } else if (per_s >= 1e4) {
    std::snprintf(text, sizeof text, "%.1fk", per_s / 1e3);
  } else {
    std::snprintf(text, sizeof text, "%.0f", per_s);
  }
  return text;
}

}  // namespace

double Progress::fraction() const {
  double f = steps > 0 ? static_cast<double>(step) / static_cast<double>(steps) : 0;
  if (seconds > 0) f = std::max(f, elapsed_s / seconds);
  return std::clamp(f, 0.0, 1.0);
}

std::string progress_line(const Progress& p) {
  char text[160];
  std::string line = "step " + std::to_string(p.step);
  if (p.steps > 0) line.append("/").append(std::to_string(p.steps));
  std::snprintf(text, sizeof text, "  loss %.3f", p.loss);
  line += text;
  if (p.val_loss > 0) {
    std::snprintf(text, sizeof text, " (val %.3f)", p.val_loss);
    line += text;
  }
  line.append("  ").append(rate(p.tokens_per_s)).append(" tok/s");
  const double f = p.fraction();
  if (f > 0) line.append("  ETA ").append(duration(p.elapsed_s * (1 - f) / f));
  return line;
}

std::string progress_bar(const Progress& p, int width) {
  constexpr int kCells = 20;
  const double f = p.fraction();
  const int filled = static_cast<int>(f * kCells + 0.5);
  char percent[16];
  std::snprintf(percent, sizeof percent, " %3.0f %%  ", std::floor(f * 100));
  std::string bar = std::string("[") + std::string(static_cast<size_t>(filled), '#') +
                    std::string(static_cast<size_t>(kCells - filled), '-') + "]" + percent +
                    progress_line(p);
  if (width > 0 && bar.size() > static_cast<size_t>(width)) bar.resize(static_cast<size_t>(width));
  return bar;
}

}  // namespace krait
