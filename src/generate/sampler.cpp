#include "generate/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "core/error.h"

namespace krait {
namespace {

// The first token of the highest logit.
size_t most_likely(std::span<const float> logits) {
  if (logits.empty()) throw Error("no logits", "logits");
  size_t best = 0;
  bool finite = false;
  for (size_t i = 0; i < logits.size(); ++i) {
    const float x = logits[i];
    if (!(x <= std::numeric_limits<float>::max())) {
      throw Error("the model gave a logit that is no number", "token " + std::to_string(i), "",
                  std::to_string(x));
    }
    if (x > logits[best]) best = i;
    finite |= x >= std::numeric_limits<float>::lowest();
  }
  if (!finite) throw Error("no token can be picked", "logits", "a finite one");
  return best;
}

// log(sum(exp(logits)))
double log_sum_exp(std::span<const float> logits) {
  const double max = logits[most_likely(logits)];
  double sum = 0;
  for (const float x : logits) sum += std::exp(x - max);
  return max + std::log(sum);
}

}  // namespace

Sampler::Sampler(const SamplingParams& params) : params_(params), rng_(params.seed) {
  params_.validate();
}

bool Sampler::more_likely(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

int32_t Sampler::sample(std::span<float> logits, std::span<const int32_t> recent_tokens) {
  if (params_.vocab_limit > 0) {
    logits = logits.first(std::min(logits.size(), static_cast<size_t>(params_.vocab_limit)));
  }
  most_likely(logits);  // refuses NaN before the penalty touches anything
  penalize(logits, recent_tokens);
  const size_t best = most_likely(logits);
  if (params_.temperature == 0) return static_cast<int32_t>(best);
  const double max_logit = logits[best];
  keep_top_k(logits);
  keep_top_p(max_logit);
  keep_min_p(max_logit);
  return draw(max_logit);
}

void Sampler::penalize(std::span<float> logits, std::span<const int32_t> recent_tokens) {
  if (params_.repeat_penalty == 1 || params_.repeat_last_n == 0) return;
  if (params_.repeat_last_n > 0) {
    const auto n = static_cast<size_t>(params_.repeat_last_n);
    recent_tokens = recent_tokens.last(std::min(recent_tokens.size(), n));
  }
  repeated_.assign(recent_tokens.begin(), recent_tokens.end());
  std::sort(repeated_.begin(), repeated_.end());
  repeated_.erase(std::unique(repeated_.begin(), repeated_.end()), repeated_.end());
  for (const int32_t id : repeated_) {
    if (id < 0 || static_cast<size_t>(id) >= logits.size()) continue;
    float& logit = logits[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / params_.repeat_penalty : logit * params_.repeat_penalty;
  }
}

// Afterwards the candidates are the k most likely, in no particular order.
void Sampler::keep_top_k(std::span<const float> logits) {
  candidates_.clear();
  const size_t k = params_.top_k <= 0 ? logits.size() : static_cast<size_t>(params_.top_k);
  const bool selects = k < logits.size();
  // At most 2 k candidates are kept; when there are that many, the best k stay and the worst of
  // them is the bar for what comes. Ids ascend, so of equal logits those that are there already
  // win.
  float bar = -std::numeric_limits<float>::infinity();
  const auto shrink = [&] {
    const auto kth = candidates_.begin() + static_cast<ptrdiff_t>(k - 1);
    std::nth_element(candidates_.begin(), kth, candidates_.end(), more_likely);
    bar = kth->logit;
    candidates_.resize(k);
  };
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!(logits[i] > bar)) continue;  // -infinity never enters
    candidates_.push_back({logits[i], static_cast<int32_t>(i)});
    if (selects && candidates_.size() == 2 * k) shrink();
  }
  if (selects && candidates_.size() > k) shrink();
}

void Sampler::keep_top_p(double max_logit) {
  if (params_.top_p >= 1) return;
  double total = 0;
  for (const Candidate& c : candidates_) total += std::exp(c.logit - max_logit);
  const double wanted = params_.top_p * total;
  // Sorted is only as much as it takes: first the 64 most likely, then four times as many, and so
  // on.
  double sum = 0;
  for (size_t sorted = 0; sorted < candidates_.size();) {
    const size_t next = std::min(candidates_.size(), std::max<size_t>(64, 4 * sorted));
    const auto from = candidates_.begin() + static_cast<ptrdiff_t>(sorted);
    const auto to = candidates_.begin() + static_cast<ptrdiff_t>(next);
    if (to != candidates_.end()) std::nth_element(from, to, candidates_.end(), more_likely);
    std::sort(from, to, more_likely);
    for (; sorted < next; ++sorted) {
      sum += std::exp(candidates_[sorted].logit - max_logit);
      if (sum >= wanted) {
        candidates_.resize(sorted + 1);
        return;
      }
    }
  }
}

void Sampler::keep_min_p(double max_logit) {
  if (params_.min_p <= 0) return;
  const double least = max_logit + std::log(static_cast<double>(params_.min_p));
  std::erase_if(candidates_, [&](const Candidate& c) { return c.logit < least; });
}

int32_t Sampler::draw(double max_logit) {
  // A fixed order, so that the outcome does not depend on how the candidates were selected.
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  const double temperature = params_.temperature;
  double total = 0;
  for (const Candidate& c : candidates_) total += std::exp((c.logit - max_logit) / temperature);
  const double point = rng_.uniform() * total;
  double sum = 0;
  for (const Candidate& c : candidates_) {
    sum += std::exp((c.logit - max_logit) / temperature);
    if (sum > point) return c.id;
  }
  return candidates_.back().id;
}

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
