#include "generate/generator.h"

#include <algorithm>
#include <cstring>

namespace krait {
namespace {

constexpr int64_t kMaxSamples = 256;

}  // namespace

const char* name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::length:
      return "length";
    case FinishReason::stop:
      return "stop";
    case FinishReason::eos:
      return "eos";
    case FinishReason::cancelled:
      return "interrupted";
  }
  return "";
}

// A sample being written.
struct Generator::Active {
  int64_t index;  // also its slot
  Sampler sampler;
  Utf8Stream utf8;
  StopMatcher stops;
  std::vector<int32_t> recent;
  Sample sample;
  int32_t last;
};

Generator::Generator(Context& ctx, const Weights& weights, const Tokenizer& tokenizer)
    : ctx_(ctx),
      weights_(weights),
      tokenizer_(tokenizer),
      eos_(weights.config.eos_token_ids),
      state_(weights.config, 1, DType::f32, ctx.memory()),
      chunk_(ctx, DType::i32, {prefill_chunk(ctx.engine())}, /*mirrors=*/2),
      seq_start_(ctx, DType::i32, {2}, /*mirrors=*/2),
      chunk_hidden_(weights.dtype, {prefill_chunk(ctx.engine()), weights.config.d_model},
                    ctx.memory()) {
  if (eos_.empty() && tokenizer.eos_id()) eos_.push_back(*tokenizer.eos_id());
  reserve(1);
}

bool Generator::is_eos(int32_t token) const {
  return std::find(eos_.begin(), eos_.end(), token) != eos_.end();
}

void Generator::remember(std::span<const int32_t> tokens) {
  total_ += static_cast<int64_t>(tokens.size());
  recent_.insert(recent_.end(), tokens.begin(), tokens.end());
  if (recent_.size() > 2 * kRecentTokens)
    recent_.erase(recent_.begin(), recent_.end() - static_cast<int64_t>(kRecentTokens));
}

std::span<const int32_t> Generator::recent() const {
  return std::span(recent_).last(std::min(recent_.size(), kRecentTokens));
}

bool Generator::feed(std::span<const int32_t> tokens, const KeepGoing& keep_going) {
  check_tokens(tokens, weights_.config.vocab_size);
  const int64_t at_once = prefill_chunk(ctx_.engine());
  // The model always stands one token behind: the last one waits for the step that asks for logits.
  while (!tokens.empty()) {
    if (keep_going && !keep_going()) return false;
    int32_t* const chunk = chunk_.host_ptr<int32_t>();
    int64_t count = 0;
    if (pending_ >= 0) chunk[count++] = pending_;
    const int64_t take =
        std::min<int64_t>(at_once - count + 1, static_cast<int64_t>(tokens.size()));
    std::copy_n(tokens.begin(), take - 1, chunk + count);
    count += take - 1;
    if (count > 0) {
      int32_t* const seq_start = seq_start_.host_ptr<int32_t>();
      seq_start[0] = 0;
      seq_start[1] = static_cast<int32_t>(count);
      chunk_.upload(count);
      seq_start_.upload(2);
      forward(ctx_, weights_,
              {.tokens = chunk_.view().slice(0, 0, count), .seq_start = seq_start_, .slot = {}},
              &state_, chunk_hidden_->slice(0, 0, count));
    }
    const std::span<const int32_t> taken = tokens.first(static_cast<size_t>(take));
    remember(taken);
    pending_ = taken.back();
    tokens = tokens.subspan(static_cast<size_t>(take));
  }
  return true;
}

void Generator::reserve(int64_t count) {
  if (tokens_.view() && tokens_.view().shape[0] >= count) return;
  const Config& c = weights_.config;
  ctx_.engine().synchronize(ctx_);  // what is freed may be in use
  recordings_.clear();
  if (state_.slots() < count) {
    DecodeState larger(c, count, DType::f32, ctx_.memory());
    larger.restore(0, state_.save(0));
    state_ = std::move(larger);
  }
  tokens_ = MirroredTensor(ctx_, DType::i32, {count});
  slot_ = MirroredTensor(ctx_, DType::i32, {count});
  logits_ = MirroredTensor(ctx_, DType::f32, {count, c.vocab_size});
}

void Generator::step_all(int64_t count) {
  const auto first = [count](const Tensor& t) { return t.slice(0, 0, count); };
  tokens_.upload(count);
  slot_.upload(count);
  recordings_.run(ctx_, {count}, [&] {
    decode(ctx_, weights_, first(tokens_), first(slot_), state_, first(logits_));
  });
  logits_.download(count);
}

std::vector<float> Generator::next_logits() {
  if (empty()) throw Error("no logits without a token", "prompt", "at least one token", "none");
  const std::vector<std::byte> before = state_.save(0);
  tokens_.host_ptr<int32_t>()[0] = pending_;
  slot_.host_ptr<int32_t>()[0] = 0;
  step_all(1);
  state_.restore(0, before);
  const float* const first = logits_.host_ptr<float>();
  return std::vector<float>(first, first + weights_.config.vocab_size);
}

// Takes a token into a sample; finish_reason is `cancelled` while the sample goes on. Returns false
// when on_text wants no more.
bool Generator::accept(Active& active, int32_t token, const GenerateOptions& options,
                       const OnText& on_text) {
  Sample& sample = active.sample;
  sample.tokens.push_back(token);
  active.recent.push_back(token);
  active.last = token;
  std::string text;
  if (!options.ignore_eos && is_eos(token)) {
    sample.finish_reason = FinishReason::eos;
  } else {
    if (token < tokenizer_.size() && !tokenizer_.is_special(token))
      text = active.stops.push(active.utf8.push(tokenizer_.token_bytes(token)));
    if (active.stops.found())
      sample.finish_reason = FinishReason::stop;
    else if (static_cast<int64_t>(sample.tokens.size()) == options.max_tokens)
      sample.finish_reason = FinishReason::length;
    else
      sample.finish_reason = FinishReason::cancelled;  // unless more follows
  }
  sample.text += text;
  return !on_text || on_text(active.index, text);
}

// Hands on what was held back; after a stop string that is nothing.
void Generator::finish(Active& active, const OnText& on_text) {
  std::string rest = active.stops.push(active.utf8.flush());
  rest += active.stops.flush();
  active.sample.text += rest;
  if (on_text && !rest.empty()) on_text(active.index, rest);
}

std::vector<Generator::Active> Generator::start(const GenerateOptions& options) {
  reserve(options.samples);
  std::vector<Active> active;
  for (int64_t i = 0; i < options.samples; ++i) {
    if (i > 0) state_.copy(ctx_, 0, i);
    SamplingParams params = options.sampling;
    params.seed += static_cast<uint64_t>(i);
    if (!options.any_token && params.vocab_limit == 0)
      params.vocab_limit =
          static_cast<int32_t>(std::min<int64_t>(tokenizer_.size(), weights_.config.vocab_size));
    active.push_back({i,
                      Sampler(params),
                      {},
                      StopMatcher(options.stop),
                      {recent().begin(), recent().end()},
                      {},
                      pending_});
  }
  return active;
}

std::vector<Sample> Generator::generate(const GenerateOptions& options, const OnText& on_text) {
  if (empty()) throw Error("empty prompt", "prompt", "at least one token", "none");
  if (options.samples < 1 || options.samples > kMaxSamples)
    throw Error("number of samples out of range", "samples", "1 to " + std::to_string(kMaxSamples),
                std::to_string(options.samples));
  std::vector<Sample> out(static_cast<size_t>(options.samples));
  if (options.max_tokens == 0) return out;
  std::vector<Active> active = start(options);
  for (bool wanted = true; wanted && !active.empty();) {
    const int64_t count = static_cast<int64_t>(active.size());
    int32_t *const tokens = tokens_.host_ptr<int32_t>(), *const slot = slot_.host_ptr<int32_t>();
    for (int64_t i = 0; i < count; ++i) {
      const Active& a = active[static_cast<size_t>(i)];
      tokens[i] = a.last;
      slot[i] = static_cast<int32_t>(a.index);
    }
    step_all(count);
    const Tensor rows = logits_.host();
    for (int64_t i = 0; wanted && i < count; ++i) {
      Active& a = active[static_cast<size_t>(i)];
      const std::span<float> row(rows.row<float>(i),
                                 static_cast<size_t>(weights_.config.vocab_size));
      wanted = accept(a, a.sampler.sample(row, a.recent), options, on_text);
    }
    std::erase_if(active, [&](Active& a) {
      if (wanted && a.sample.finish_reason == FinishReason::cancelled) return false;
      finish(a, on_text);
      if (a.index == 0) {
        pending_ = a.last;
        remember(a.sample.tokens);
      }
      out[static_cast<size_t>(a.index)] = std::move(a.sample);
      return true;
    });
  }
  return out;
}

void Generator::reset() {
  state_.reset();
  pending_ = -1;
  recent_.clear();
  total_ = 0;
}

SavedConversation Generator::save() const {
  return {state_.save(0), pending_, {recent().begin(), recent().end()}, total_};
}

void Generator::restore(const SavedConversation& saved) {
  check_tokens(saved.recent, weights_.config.vocab_size);
  state_.restore(0, saved.state);
  pending_ = saved.pending;
  recent_ = saved.recent;
  total_ = saved.tokens;
}

}  // namespace krait
