#include "generate/logprobs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "core/error.h"
#include "ops/sample_host.h"

namespace krait {
namespace {

// log(sum(exp(logits)))
double log_sum_exp(std::span<const float> logits) {
  if (logits.empty()) throw Error("no logits", "logits");
  const SamplingPick best = most_likely(logits);
  check_picked(best.token, best.picked);
  const double max = logits[static_cast<size_t>(best.token)];
  double sum = 0;
  for (const float x : logits) sum += std::exp(x - max);
  return max + std::log(sum);
}

}  // namespace

double token_logprob(std::span<const float> logits, int32_t id) {
  if (id < 0 || static_cast<size_t>(id) >= logits.size()) {
    throw Error("no such token", "token id", "below " + std::to_string(logits.size()),
                std::to_string(id));
  }
  return logits[static_cast<size_t>(id)] - log_sum_exp(logits);
}

std::vector<std::pair<int32_t, double>> top_logprobs(std::span<const float> logits, size_t k) {
  const double normalizer = log_sum_exp(logits);
  std::vector<std::pair<int32_t, double>> all;
  all.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    all.emplace_back(static_cast<int32_t>(i), logits[i] - normalizer);
  }
  k = std::min(k, all.size());
  std::partial_sort(all.begin(), all.begin() + static_cast<ptrdiff_t>(k), all.end(),
                    [](const auto& a, const auto& b) {
                      return a.second != b.second ? a.second > b.second : a.first < b.first;
                    });
  all.resize(k);
  return all;
}

}  // namespace krait
