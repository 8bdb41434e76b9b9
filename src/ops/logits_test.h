// Logits for tests of what is made of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "core/rng.h"

namespace krait::logits_test {

inline std::vector<float> random_logits(size_t n, uint64_t seed, double spread = 3) {
  Rng rng(seed);
  std::vector<float> logits(n);
  for (float& x : logits) x = static_cast<float>(spread * rng.normal());
  return logits;
}

inline std::vector<double> softmax(std::span<const float> logits, double temperature = 1) {
  double total = 0;
  std::vector<double> p;
  for (const float x : logits) total += p.emplace_back(std::exp(x / temperature));
  for (double& x : p) x /= total;
  return p;
}

// Ids from most likely to least.
inline std::vector<int32_t> ranked(std::span<const float> logits) {
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  return ids;
}

}  // namespace krait::logits_test
