// Picks the next token of each sequence from its logits, and does what the next step needs: the
// token goes where that step reads it, and a sequence that has ended leaves its slot. So tokens
// need not pass through the host. Parameters have llama.cpp's names, defaults and order of
// application:
//   1. repeat penalty: of every token among the last repeat_last_n, a positive logit is divided by
//      repeat_penalty, another multiplied by it, once, however often the token occurred;
//   2. top-k: the k most likely remain (of equal logits the lower ids);
//   3. top-p: of those, the fewest most likely ones whose probabilities (softmax over what top-k
//      left) sum to top_p or more;
//   4. min-p: of those, the ones with at least min_p times the probability of the most likely;
//   5. temperature: logits are divided by it, and one of what remains is drawn by softmax.
// Probabilities are integers (sample_weight.h), so that sums are exact in any order: all engines
// pick the same token from the same logits.
#pragma once

#include <cstdint>

#include "ops/context.h"
#include "ops/cost.h"

namespace krait {

struct SamplingParams {
  float temperature =
      0.8f;  // 0: the most likely token after step 1 (the lowest id among equals), nothing is drawn
  int top_k = 40;               // 0 or less: off
  float top_p = 0.95f;          // 1: off
  float min_p = 0.05f;          // 0: off
  float repeat_penalty = 1.0f;  // 1: off
  int repeat_last_n = 64;       // 0: off, -1: all recent tokens that are kept
  uint64_t seed = 0;
  int32_t vocab_limit = 0;  // ids from here on are never picked (a padded vocabulary); 0: no limit

  void validate() const;  // throws Error that names the parameter
  bool penalizes() const { return repeat_penalty != 1 && repeat_last_n != 0; }
};

inline constexpr int kMaxEndTokens = 8;
inline constexpr int64_t kMaxSampledVocab = int64_t{1} << 19;

// A sequence between two of its tokens, in the engine's memory.
struct SampledSequence {
  uint64_t seed;
  uint64_t rng_position;  // in the random numbers of the seed; a draw takes two
  int64_t remaining;      // tokens until it ends; 0: it has ended
  int64_t tokens;         // so far; token number i lies at i % capacity of `recent`
  double log_min_p;       // -infinity: off
  float temperature, top_p, repeat_penalty;
  int32_t top_k, repeat_last_n, vocab_limit;  // vocab_limit 0: none
  int32_t end_token_count;
  int32_t end_tokens[kMaxEndTokens];  // tokens that end it
};

// The parameters; no tokens so far, no end tokens, `remaining` to come. Throws Error: validate().
SampledSequence sampled_sequence(const SamplingParams& params, int64_t remaining);

// What became of a row.
enum class Picked : int32_t {
  token,           // a token was picked
  at_rest,         // its sequence had ended before
  not_a_number,    // a logit is NaN
  infinite,        // a logit is +infinity, of a repeat penalty that was too much perhaps
  nothing_finite,  // no token can be picked
};

struct TokenSampling {
  Tensor logits;  // (num_seqs, vocab_size)  f32; -infinity: not to be picked; out: after step 1
  Tensor slot;    // (num_seqs)  i32; distinct, apart from spare_slot; out: spare_slot where the
                  // sequence has ended
  int32_t spare_slot;  // its sequence has ended; rows without a sequence share it
  Tensor sequence;     // (slots, sizeof(SampledSequence))  u8; in and out
  Tensor recent;       // (slots, capacity)  i32; the last tokens of each sequence, a ring; in, out
  Tensor tokens;       // (num_seqs)  i32; out: the token; a row at rest keeps what it has
  Tensor picked;       // (num_seqs, 2)  i32; out: token and Picked. Where a logit is no number, the
                       // lowest id that has one in place of the token; its sequence ends
};

Cost sample_cost(const TokenSampling&);
void sample_tokens(Context&, const TokenSampling&);

// For the host, with what came back in `picked`: throws Error where no token could be picked.
void check_picked(int32_t token, Picked picked);

}  // namespace krait
