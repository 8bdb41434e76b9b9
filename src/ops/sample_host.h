// What the engines on the host share of sampling: a row from its logits to its result, but for the
// choice among candidates.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "core/rng.h"
#include "ops/sample.h"
#include "ops/sample_weight.h"

namespace krait {

struct SamplingCandidate {
  float logit;
  int32_t id;
};

inline bool more_likely(const SamplingCandidate& a, const SamplingCandidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

struct SamplingPick {
  int32_t token;
  Picked picked;
};

// The first token of the highest logit, or what is wrong.
inline SamplingPick most_likely(std::span<const float> logits) {
  size_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const float x = logits[i];
    if (!(x <= std::numeric_limits<float>::max()))
      return {static_cast<int32_t>(i), std::isnan(x) ? Picked::not_a_number : Picked::infinite};
    if (x > logits[best]) best = i;
  }
  const bool finite = logits[best] >= std::numeric_limits<float>::lowest();
  return {static_cast<int32_t>(best), finite ? Picked::token : Picked::nothing_finite};
}

// repeated: scratch for as many tokens as `recent` holds of a sequence.
inline void penalize(const SampledSequence& s, const int32_t* recent, int64_t capacity,
                     int32_t* repeated, std::span<float> logits) {
  if (s.repeat_penalty == 1 || s.repeat_last_n == 0) return;
  int64_t count = std::min(s.tokens, capacity);
  if (s.repeat_last_n > 0) count = std::min(count, int64_t{s.repeat_last_n});
  for (int64_t i = 0; i < count; ++i) repeated[i] = recent[(s.tokens - 1 - i) % capacity];
  std::sort(repeated, repeated + count);
  const int32_t* const end = std::unique(repeated, repeated + count);
  for (const int32_t* id = repeated; id < end; ++id) {
    if (*id < 0 || static_cast<size_t>(*id) >= logits.size()) continue;
    float& logit = logits[static_cast<size_t>(*id)];
    logit = logit > 0 ? logit / s.repeat_penalty : logit * s.repeat_penalty;
  }
}

// Of candidates in the order of their ids.
inline int32_t draw(SampledSequence& s, std::span<const SamplingCandidate> candidates,
                    float max_logit) {
  const double log2_per_logit = kLog2E64 / double{s.temperature};
  const auto weight = [&](const SamplingCandidate& c) {
    return sampling_weight(c.logit, max_logit, log2_per_logit);
  };
  uint64_t total = 0;
  for (const SamplingCandidate& c : candidates) total += weight(c);
  Rng rng(s.seed);
  rng.seek(s.rng_position);
  const uint64_t point = sampling_point(rng.next_53_bits(), total);
  s.rng_position = rng.position();
  uint64_t sum = 0;
  for (const SamplingCandidate& c : candidates)
    if ((sum += weight(c)) > point) return c.id;
  return candidates.back().id;
}

// choose(sequence, logits, max_logit) gives a token from logits of which the highest is finite;
// repeated: scratch for `capacity` tokens.
template <class Choose>
void sample_row(const TokenSampling& op, int64_t row, int32_t* repeated, Choose&& choose) {
  int32_t& slot = op.slot.ptr<int32_t>()[row];
  int32_t& token = op.tokens.ptr<int32_t>()[row];
  int32_t* const picked = op.picked.row<int32_t>(row);
  SampledSequence& s = reinterpret_cast<SampledSequence*>(op.sequence.ptr<uint8_t>())[slot];
  const auto report = [&](SamplingPick pick) {
    picked[0] = pick.token;
    picked[1] = static_cast<int32_t>(pick.picked);
  };
  if (s.remaining == 0) return report({token, Picked::at_rest});
  int64_t vocab = op.logits.shape[1];
  if (s.vocab_limit > 0) vocab = std::min<int64_t>(vocab, s.vocab_limit);
  const std::span<float> logits(op.logits.row<float>(row), static_cast<size_t>(vocab));
  int32_t* const recent = op.recent.row<int32_t>(slot);
  const int64_t capacity = op.recent.shape[1];
  penalize(s, recent, capacity, repeated, logits);
  SamplingPick pick = most_likely(logits);
  if (pick.picked == Picked::token) {
    if (s.temperature > 0) pick.token = choose(s, logits, logits[static_cast<size_t>(pick.token)]);
    token = pick.token;
    recent[s.tokens++ % capacity] = token;
    --s.remaining;
    const int32_t* const end = s.end_tokens + s.end_token_count;
    if (std::find<const int32_t*>(s.end_tokens, end, token) != end) s.remaining = 0;
  } else {
    s.remaining = 0;
  }
  report(pick);
  if (s.remaining == 0) slot = op.spare_slot;
}

}  // namespace krait
