#include "generate/scorer.h"

#include <algorithm>
#include <cmath>

#include "generate/logprobs.h"

namespace krait {

Scorer::Scorer(Context& ctx, const Weights& weights, const ScorerOptions& options)
    : ctx_(ctx),
      weights_(weights),
      state_(weights.config, 1, options.state_dtype, ctx.memory()),
      chunk_(options.chunk > 0 ? options.chunk : prefill_chunk(ctx.engine())),
      tokens_(ctx, DType::i32, {chunk_}),
      targets_(ctx, DType::i32, {chunk_}),
      seq_start_(ctx, DType::i32, {chunk_ + 1}),
      loss_(ctx, DType::f32, {chunk_}),
      logits_(ctx, DType::f32, {1, weights.config.vocab_size}),
      logprobs_(static_cast<size_t>(chunk_)) {}

void Scorer::load(std::span<const int32_t> tokens, int64_t begin, int64_t end) {
  std::copy(tokens.begin() + begin, tokens.begin() + end, tokens_.host_ptr<int32_t>());
  std::copy(tokens.begin() + begin + 1, tokens.begin() + end + 1, targets_.host_ptr<int32_t>());
}

const float* Scorer::run(int64_t count, int64_t num_seqs, DecodeState* state) {
  tokens_.upload(count);
  targets_.upload(count);
  seq_start_.upload(num_seqs + 1);
  krait::score(ctx_, weights_,
               {.tokens = tokens_.view().slice(0, 0, count),
                .seq_start = seq_start_.view().slice(0, 0, num_seqs + 1),
                .slot = {}},
               targets_.view().slice(0, 0, count), state, loss_.view().slice(0, 0, count));
  loss_.download(count);
  const float* const loss = loss_.host_ptr<float>();
  for (int64_t i = 0; i < count; ++i)
    if (!std::isfinite(loss[i]))
      throw Error("the model's output is not a number", "logits", "finite weights",
                  std::to_string(loss[i]));
  return loss;
}

void Scorer::continue_from(SavedConversation before) {
  state_.restore(0, before.state);
  before_ = std::move(before);
}

bool Scorer::score(std::span<const int32_t> tokens, const OnLogprobs& on_logprobs) {
  if (tokens.empty()) throw Error("nothing to score", "tokens", "at least one token", "none");
  check_tokens(tokens, weights_.config.vocab_size);
  std::vector<int32_t> continued;
  if (before_.pending >= 0) {
    state_.restore(0, before_.state);
    continued.reserve(tokens.size() + 1);
    continued.push_back(before_.pending);
    continued.insert(continued.end(), tokens.begin(), tokens.end());
    tokens = continued;
  } else {
    state_.reset();
  }
  last_ = tokens.back();
  const int64_t predictions = static_cast<int64_t>(tokens.size()) - 1;
  for (int64_t begin = 0; begin < predictions; begin += chunk_) {
    const int64_t count = std::min(chunk_, predictions - begin);
    load(tokens, begin, begin + count);
    int32_t* const seq_start = seq_start_.host_ptr<int32_t>();
    seq_start[0] = 0;
    seq_start[1] = static_cast<int32_t>(count);
    const float* const loss = run(count, 1, &state_);
    std::transform(loss, loss + count, logprobs_.begin(), [](float l) { return -l; });
    if (!on_logprobs({logprobs_.data(), static_cast<size_t>(count)})) return false;
  }
  return true;
}

std::vector<std::pair<int32_t, double>> Scorer::top(size_t k) {
  KRAIT_CHECK(last_ >= 0, "top() before score()");
  const std::vector<std::byte> before = state_.save(0);
  tokens_.host_ptr<int32_t>()[0] = last_;
  tokens_.upload(1);
  decode(ctx_, weights_, tokens_.view().slice(0, 0, 1), {}, state_, logits_);
  logits_.download(1);
  state_.restore(0, before);
  return top_logprobs({logits_.host_ptr<float>(), static_cast<size_t>(weights_.config.vocab_size)},
                      k);
}

bool Scorer::evaluate(std::span<const int32_t> tokens, int64_t context, const Tokenizer& tokenizer,
                      Total& total, const std::function<bool()>& keep_going) {
  check_tokens(tokens, weights_.config.vocab_size);
  state_.reset();
  const int64_t predictions = static_cast<int64_t>(tokens.size()) - 1;
  // Several short windows at once, packed; or a part of a long one, with the state carried.
  const bool packed = context > 0 && context <= chunk_;
  const int64_t round = packed ? chunk_ / context * context : chunk_;
  int64_t count = 0;
  for (int64_t begin = 0; begin < predictions; begin += count) {
    if (keep_going && !keep_going()) return false;
    count = std::min(round, predictions - begin);
    if (!packed && context > 0) {
      if (begin % context == 0) state_.reset();
      count = std::min(count, context - begin % context);
    }
    int32_t* const seq_start = seq_start_.host_ptr<int32_t>();
    int64_t num_seqs = 0;
    for (int64_t at = 0; at < count; at += packed ? context : count)
      seq_start[num_seqs++] = static_cast<int32_t>(at);
    seq_start[num_seqs] = static_cast<int32_t>(count);
    load(tokens, begin, begin + count);
    const float* const loss = run(count, num_seqs, packed ? nullptr : &state_);
    for (int64_t i = 0; i < count; ++i) {
      total.loss += loss[i];
      const int32_t target = tokens[static_cast<size_t>(begin + i + 1)];
      if (target < tokenizer.size())
        total.bytes += static_cast<int64_t>(tokenizer.token_bytes(target).size());
    }
    total.tokens += count;
  }
  return true;
}

}  // namespace krait
