#include "generate/generator.h"

#include <algorithm>
#include <limits>

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
  Utf8Stream utf8;
  StopMatcher stops;
  Sample sample;
  bool ended;
};

Generator::Generator(Context& ctx, const Weights& weights, const Tokenizer& tokenizer,
                     DType state_dtype)
    : ctx_(ctx),
      weights_(weights),
      tokenizer_(tokenizer),
      eos_(weights.config.eos_token_ids),
      batch_(ctx, weights, state_dtype),
      chunk_(ctx, DType::i32, {prefill_chunk(ctx.engine())}, /*mirrors=*/2),
      seq_start_(ctx, DType::i32, {2}, /*mirrors=*/2),
      chunk_hidden_(weights.dtype, {prefill_chunk(ctx.engine()), weights.config.d_model},
                    ctx.memory()) {
  if (eos_.empty() && tokenizer.eos_id()) eos_.push_back(*tokenizer.eos_id());
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
              &batch_.state(), chunk_hidden_->slice(0, 0, count));
    }
    const std::span<const int32_t> taken = tokens.first(static_cast<size_t>(take));
    remember(taken);
    pending_ = taken.back();
    tokens = tokens.subspan(static_cast<size_t>(take));
  }
  return true;
}

std::vector<float> Generator::next_logits() {
  if (empty()) throw Error("no logits without a token", "prompt", "at least one token", "none");
  return batch_.logits_after(pending_);
}

// Takes a token into a sample; finish_reason is `cancelled` while the sample goes on. Returns false
// when on_text wants no more.
bool Generator::accept(Active& active, int32_t token, const GenerateOptions& options,
                       const OnText& on_text) {
  Sample& sample = active.sample;
  sample.tokens.push_back(token);
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

SamplingParams Generator::params_of(int64_t sample, const GenerateOptions& options) const {
  SamplingParams params = options.sampling;
  params.seed += static_cast<uint64_t>(sample);
  if (!options.any_token && params.vocab_limit == 0)
    params.vocab_limit =
        static_cast<int32_t>(std::min<int64_t>(tokenizer_.size(), weights_.config.vocab_size));
  return params;
}

std::vector<Generator::Active> Generator::start(const GenerateOptions& options, bool rewinds) {
  const SamplingParams& params = options.sampling;
  const auto most = static_cast<int64_t>(kRecentTokens);
  const int64_t window =
      params.repeat_last_n < 0 ? most : std::min<int64_t>(params.repeat_last_n, most);
  batch_.reserve(options.samples, params.penalizes() ? window : 1);
  std::vector<Active> samples;
  std::vector<DecodeBatch::Sequence> sequences;
  rows_.clear();
  for (int64_t i = 0; i < options.samples; ++i) {
    samples.push_back({i, {}, StopMatcher(options.stop), {}, false});
    rows_.push_back(static_cast<size_t>(i));
    SampledSequence sampled = sampled_sequence(
        params_of(i, options),
        options.max_tokens < 0 ? std::numeric_limits<int64_t>::max() : options.max_tokens);
    if (!options.ignore_eos)  // further ones than there is room for are seen by the host
      for (const int32_t eos : std::span(eos_).first(std::min<size_t>(eos_.size(), kMaxEndTokens)))
        sampled.end_tokens[sampled.end_token_count++] = eos;
    sequences.push_back({sampled, recent()});
  }
  batch_.start(sequences, pending_, rewinds);
  return samples;
}

// Whether what ended the sample ended it on the engine, too.
bool Generator::ends_on_engine(const Sample& sample) const {
  const auto known = std::span(eos_).first(std::min<size_t>(eos_.size(), kMaxEndTokens));
  return sample.finish_reason == FinishReason::length ||
         (sample.finish_reason == FinishReason::eos &&
          std::find(known.begin(), known.end(), sample.tokens.back()) != known.end());
}

// Rows for the samples that go on.
void Generator::give_rows(const std::vector<Active>& samples) {
  std::vector<int32_t> slots, tokens;
  std::erase_if(rows_, [&](size_t i) { return samples[i].ended; });
  for (const size_t i : rows_) {
    slots.push_back(static_cast<int32_t>(i));
    tokens.push_back(samples[i].sample.tokens.back());
  }
  batch_.set_rows(slots, tokens);
}

bool Generator::take(std::vector<Active>& samples, const GenerateOptions& options,
                     const OnText& on_text) {
  const std::span<const DecodeBatch::Result> picked = batch_.read_step();
  bool wanted = true;
  for (size_t row = 0; wanted && row < rows_.size(); ++row) {
    Active& a = samples[rows_[row]];
    if (a.ended) continue;
    check_picked(picked[row].token, picked[row].picked);
    wanted = accept(a, picked[row].token, options, on_text);
  }
  for (const size_t i : rows_) {
    Active& a = samples[i];
    if (a.ended || (wanted && a.sample.finish_reason == FinishReason::cancelled)) continue;
    finish(a, on_text);
    a.ended = true;
    if (i == 0) batch_.hold_snapshots();
  }
  return wanted;
}

void Generator::run(std::vector<Active>& samples, const GenerateOptions& options,
                    const OnText& on_text) {
  const bool ahead = batch_.max_in_flight() > 1;
  for (;;) {
    const auto going_on = static_cast<size_t>(
        std::count_if(samples.begin(), samples.end(), [](const Active& a) { return !a.ended; }));
    if (going_on == 0) return;
    // Giving rows anew needs all tokens at the host, so that steps queued ahead come to an end: not
    // for a few rows of many.
    const bool fewer = ahead ? 4 * going_on <= 3 * rows_.size() : going_on < rows_.size();
    if (fewer && batch_.in_flight() == 0) {
      give_rows(samples);
      continue;
    }
    while (!fewer && batch_.in_flight() < batch_.max_in_flight() &&
           (options.max_tokens < 0 || batch_.queued() < options.max_tokens))
      batch_.queue_step();
    if (!take(samples, options, on_text)) return;
  }
}

std::vector<Sample> Generator::generate(const GenerateOptions& options, const OnText& on_text) {
  if (empty()) throw Error("empty prompt", "prompt", "at least one token", "none");
  if (options.samples < 1 || options.samples > kMaxSamples)
    throw Error("number of samples out of range", "samples", "1 to " + std::to_string(kMaxSamples),
                std::to_string(options.samples));
  std::vector<Sample> out(static_cast<size_t>(options.samples));
  if (options.max_tokens == 0) return out;
  const bool rewinds = on_text || !options.stop.empty() || eos_.size() > kMaxEndTokens;
  std::vector<Active> samples = start(options, rewinds);
  run(samples, options, on_text);
  const Sample& first = samples[0].sample;
  if (!ends_on_engine(first)) {
    std::vector<int32_t> read = {pending_};
    read.insert(read.end(), first.tokens.begin(), first.tokens.end() - 1);
    batch_.rewind(read);
  }
  pending_ = first.tokens.back();
  remember(first.tokens);
  for (size_t i = 0; i < samples.size(); ++i) out[i] = std::move(samples[i].sample);
  return out;
}

void Generator::reset() {
  batch_.state().reset();
  pending_ = -1;
  recent_.clear();
  total_ = 0;
}

SavedConversation Generator::save() const {
  return {batch_.state().save(0), pending_, {recent().begin(), recent().end()}, total_};
}

void Generator::restore(const SavedConversation& saved) {
  check_tokens(saved.recent, weights_.config.vocab_size);
  batch_.state().restore(0, saved.state);
  pending_ = saved.pending;
  recent_ = saved.recent;
  total_ = saved.tokens;
}

}  // namespace krait
