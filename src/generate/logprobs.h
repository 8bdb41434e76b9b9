// Log-probabilities out of a model's logits.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace krait {

// Natural log of a token's probability under softmax, in double. logits: (vocab_size) f32;
// -infinity is probability 0. Throws Error for NaN, +infinity, or no finite logit at all.
double token_logprob(std::span<const float> logits, int32_t id);
// The k most likely tokens with their log-probabilities, most likely first, of equal ones the lower
// id first. 0 <= k; more than the vocabulary has: all of it.
std::vector<std::pair<int32_t, double>> top_logprobs(std::span<const float> logits, size_t k);

}  // namespace krait
