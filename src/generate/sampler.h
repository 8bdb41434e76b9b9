// Picks the next token from a model's logits, as ops/sample.h describes.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "core/rng.h"
#include "ops/sample.h"

namespace krait {

// The same parameters and the same logits give the same tokens. O(vocabulary) per token; memory is
// kept from call to call.
class Sampler {
 public:
  explicit Sampler(const SamplingParams& params);  // throws Error: validate()

  // logits: (vocab_size) f32, -infinity: not to be picked. Step 1 is written into them.
  // recent_tokens: prompt and output so far, the latest last. Throws Error for NaN, +infinity, or
  // no finite logit at all.
  int32_t sample(std::span<float> logits, std::span<const int32_t> recent_tokens);

  const SamplingParams& params() const { return params_; }
  // Where the random numbers stand; seeking there continues as if nothing had been in between.
  uint64_t rng_position() const { return rng_.position(); }
  void seek_rng(uint64_t position) { rng_.seek(position); }

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };
  static bool more_likely(const Candidate& a, const Candidate& b);

  void penalize(std::span<float> logits, std::span<const int32_t> recent_tokens);
  void keep_top_k(std::span<const float> logits);
  void keep_top_p(double max_logit);
  void keep_min_p(double max_logit);
  int32_t draw(double max_logit);

  SamplingParams params_;
  Rng rng_;
  std::vector<Candidate> candidates_;
  std::vector<int32_t> repeated_;
};

// Natural log of a token's probability under softmax, in double. logits: (vocab_size) f32;
// -infinity is probability 0. Throws Error as Sampler::sample does.
double token_logprob(std::span<const float> logits, int32_t id);
// The k most likely tokens with their log-probabilities, most likely first, of equal ones the lower
// id first. 0 <= k; more than the vocabulary has: all of it.
std::vector<std::pair<int32_t, double>> top_logprobs(std::span<const float> logits, size_t k);

}  // namespace krait
