// Text from a model. A Generator holds one conversation: feed() reads tokens into it, generate()
// goes on from there. Prompts of any length take constant memory, since all that the model
// remembers is its state; several samples of one prompt copy that state and do not read the prompt
// again.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "generate/decode_batch.h"
#include "generate/tokenizer.h"
#include "generate/utf8_stream.h"
#include "model/language_model.h"
#include "ops/mirrored_tensor.h"
#include "ops/sample.h"

namespace krait {

// Tokens that go through the model at once: as many as keep the machine busy and no more, since
// they take memory.
inline int64_t prefill_chunk(const Engine& engine) {
  return engine.memory().on_host() ? 512 : 32768;
}

// Latest tokens that the repetition penalty can look back at.
inline constexpr size_t kRecentTokens = size_t{1} << 16;

enum class FinishReason { length, stop, eos, cancelled };
const char* name_of(FinishReason reason);

struct GenerateOptions {
  int64_t max_tokens = 128;  // of each sample; negative: until something else ends it
  int64_t samples = 1;
  SamplingParams sampling;        // sample i draws with seed + i
  std::vector<std::string> stop;  // text that ends a sample; it is not part of the sample's text
  bool ignore_eos = false;        // the end-of-text token is a token like any other
  bool any_token = false;         // also ids that the tokenizer does not know, which have no text
};

struct Sample {
  std::string text;             // always UTF-8
  std::vector<int32_t> tokens;  // with the end-of-text token and those of the stop string
  FinishReason finish_reason = FinishReason::length;
};

// A conversation put aside: all that is needed to go on with it later, or twice.
struct SavedConversation {
  std::vector<std::byte> state;  // DecodeState::save
  int32_t pending = -1;          // the last token, not yet read by the model; -1: none
  std::vector<int32_t> recent;   // the last tokens, at most kRecentTokens; ends in `pending`
  int64_t tokens = 0;            // all so far, with `pending`
};

class Generator {
 public:
  // Called for each token of each sample with the text that has become certain, which may be empty:
  // incomplete UTF-8 and what may become a stop string are held back. false ends all samples. The
  // engine may be some tokens further by then; nobody ever sees those.
  using OnText = std::function<bool(int64_t sample, std::string_view text)>;
  // Asked between chunks of a prompt; false stops reading.
  using KeepGoing = std::function<bool()>;

  // All three outlive this. state_dtype: f32 or bf16.
  Generator(Context& ctx, const Weights& weights, const Tokenizer& tokenizer,
            DType state_dtype = DType::f32);

  // Appends tokens to the conversation. Returns false when keep_going did. Throws Error for a token
  // outside the vocabulary.
  bool feed(std::span<const int32_t> tokens, const KeepGoing& keep_going = {});

  // Continues the conversation; it then stands where sample 0 ended, at its last token, whatever
  // ended it: exactly, also where steps behind that token had been queued. Throws Error when it is
  // empty, for options out of range, and for logits that are no numbers; after the last of these
  // the conversation is to be restored or reset.
  std::vector<Sample> generate(const GenerateOptions& options, const OnText& on_text = {});

  // (vocab_size) f32: logits of the next token. Does not change the conversation.
  std::vector<float> next_logits();

  void reset();
  SavedConversation save() const;
  void restore(const SavedConversation& saved);  // throws Error when it is of another model
  bool empty() const { return pending_ < 0; }
  bool is_eos(int32_t token) const;

 private:
  struct Active;
  void remember(std::span<const int32_t> tokens);
  std::span<const int32_t> recent() const;
  SamplingParams params_of(int64_t sample, const GenerateOptions& options) const;
  std::vector<Active> start(const GenerateOptions& options, bool rewinds);
  // Steps until all samples have ended; what the rows of the oldest one in flight picked goes to
  // take().
  void run(std::vector<Active>& samples, const GenerateOptions& options, const OnText& on_text);
  bool take(std::vector<Active>& samples, const GenerateOptions& options, const OnText& on_text);
  bool accept(Active& active, int32_t token, const GenerateOptions& options, const OnText& on_text);
  void finish(Active& active, const OnText& on_text);
  void give_rows(const std::vector<Active>& samples);
  bool ends_on_engine(const Sample& sample) const;

  Context& ctx_;
  const Weights& weights_;
  const Tokenizer& tokenizer_;
  std::vector<int32_t> eos_;
  DecodeBatch batch_;         // slot 0: the conversation
  std::vector<size_t> rows_;  // of the batch: numbers of samples
  int32_t pending_ = -1;
  std::vector<int32_t> recent_;       // at least the last kRecentTokens
  int64_t total_ = 0;                 // tokens so far
  MirroredTensor chunk_, seq_start_;  // (prefill_chunk), (2)  i32
  OwnedTensor chunk_hidden_;          // (prefill_chunk, d_model)  T
};

}  // namespace krait
