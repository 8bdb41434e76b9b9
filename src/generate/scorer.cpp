#include "generate/scorer.h"

#include <algorithm>
#include <cmath>

#include "generate/generator.h"
#include "generate/sampler.h"

namespace krait {

Scorer::Scorer(Context& ctx, const Weights& weights)
    : ctx_(ctx),
      weights_(weights),
      state_(weights.config, 1),
      tokens_(DType::i32, {kPrefillChunk}),
      targets_(DType::i32, {kPrefillChunk}),
      seq_start_(DType::i32, {kPrefillChunk + 1}),
      loss_(DType::f32, {kPrefillChunk}),
      hidden_(weights.dtype, {1, weights.config.d_model}),
      logits_(DType::f32, {1, weights.config.vocab_size}),
      logprobs_(static_cast<size_t>(kPrefillChunk)) {}

void Scorer::load(std::span<const int32_t> tokens, int64_t begin, int64_t end) {
  std::copy(tokens.begin() + begin, tokens.begin() + end, tokens_->ptr<int32_t>());
  std::copy(tokens.begin() + begin + 1, tokens.begin() + end + 1, targets_->ptr<int32_t>());
}

void Scorer::run(int64_t count, int64_t num_seqs, DecodeState* state) {
  krait::score(ctx_, weights_,
               {.tokens = tokens_->slice(0, 0, count),
                .seq_start = seq_start_->slice(0, 0, num_seqs + 1),
                .slot = {}},
               targets_->slice(0, 0, count), state, loss_->slice(0, 0, count));
  for (int64_t i = 0; i < count; ++i)
    if (!std::isfinite(loss_->ptr<float>()[i]))
      throw Error("the model's output is not a number", "logits", "finite weights",
                  std::to_string(loss_->ptr<float>()[i]));
}

bool Scorer::score(std::span<const int32_t> tokens, const OnLogprobs& on_logprobs) {
  if (tokens.empty()) throw Error("nothing to score", "tokens", "at least one token", "none");
  check_tokens(tokens, weights_.config.vocab_size);
  state_.reset();
  last_ = tokens.back();
  const int64_t predictions = static_cast<int64_t>(tokens.size()) - 1;
  int32_t* const seq_start = seq_start_->ptr<int32_t>();
  for (int64_t begin = 0; begin < predictions; begin += kPrefillChunk) {
    const int64_t count = std::min(kPrefillChunk, predictions - begin);
    load(tokens, begin, begin + count);
    seq_start[0] = 0;
    seq_start[1] = static_cast<int32_t>(count);
    run(count, 1, &state_);
    const float* const loss = loss_->ptr<float>();
    std::transform(loss, loss + count, logprobs_.begin(), [](float l) { return -l; });
    if (!on_logprobs({logprobs_.data(), static_cast<size_t>(count)})) return false;
  }
  return true;
}

std::vector<std::pair<int32_t, double>> Scorer::top(size_t k) {
  KRAIT_CHECK(last_ >= 0, "top() before score()");
  const std::vector<std::byte> before = state_.save(0);
  tokens_->ptr<int32_t>()[0] = last_;
  step(ctx_, weights_, tokens_->slice(0, 0, 1), {}, state_, hidden_);
  logits(ctx_, weights_, hidden_, logits_);
  state_.restore(0, before);
  return top_logprobs({logits_->ptr<float>(), static_cast<size_t>(weights_.config.vocab_size)}, k);
}

bool Scorer::evaluate(std::span<const int32_t> tokens, int64_t context, const Tokenizer& tokenizer,
                      Total& total, const std::function<bool()>& keep_going) {
  check_tokens(tokens, weights_.config.vocab_size);
  state_.reset();
  const int64_t predictions = static_cast<int64_t>(tokens.size()) - 1;
  int32_t* const seq_start = seq_start_->ptr<int32_t>();
  // Several short windows at once, packed; or a part of a long one, with the state carried.
  const bool packed = context > 0 && context <= kPrefillChunk;
  const int64_t round = packed ? kPrefillChunk / context * context : kPrefillChunk;
  int64_t count = 0;
  for (int64_t begin = 0; begin < predictions; begin += count) {
    if (keep_going && !keep_going()) return false;
    count = std::min(round, predictions - begin);
    if (!packed && context > 0) {
      if (begin % context == 0) state_.reset();
      count = std::min(count, context - begin % context);
    }
    int64_t num_seqs = 0;
    for (int64_t at = 0; at < count; at += packed ? context : count)
      seq_start[num_seqs++] = static_cast<int32_t>(at);
    seq_start[num_seqs] = static_cast<int32_t>(count);
    load(tokens, begin, begin + count);
    run(count, num_seqs, packed ? nullptr : &state_);
    for (int64_t i = 0; i < count; ++i) {
      total.loss += loss_->ptr<float>()[i];
      const int32_t target = targets_->ptr<int32_t>()[i];
      if (target < tokenizer.size())
        total.bytes += static_cast<int64_t>(tokenizer.token_bytes(target).size());
    }
    total.tokens += count;
  }
  return true;
}

}  // namespace krait
