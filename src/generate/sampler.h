// Picks the next token from a model's logits. Parameters have llama.cpp's names, defaults and order
// of application:
//   1. repeat penalty: of every token among the last repeat_last_n, a positive logit is divided by
//   repeat_penalty, another
//      multiplied by it, once, however often the token occurred;
//   2. top-k: the k most likely remain (of equal logits the lower ids);
//   3. top-p: of those, the fewest most likely ones whose probabilities (softmax over what top-k
//   left) sum to top_p or more;
//   4. min-p: of those, the ones with at least min_p times the probability of the most likely;
//   5. temperature: logits are divided by it, and one of what remains is drawn by softmax.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "core/rng.h"

namespace krait {

struct SamplingParams {
  float temperature =
      0.8f;  // 0: the most likely token after step 1 (the lowest id among equals), nothing is drawn
  int top_k = 40;               // 0 or less: off
  float top_p = 0.95f;          // 1: off
  float min_p = 0.05f;          // 0: off
  float repeat_penalty = 1.0f;  // 1: off
  int repeat_last_n = 64;       // 0: off, -1: all recent tokens
  uint64_t seed = 0;
  int32_t vocab_limit = 0;  // ids from here on are never picked (a padded vocabulary); 0: no limit

  void validate() const;  // throws Error that names the parameter
};

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
