// How likely a text is under a model. Texts of any length go through in chunks, with the state
// carried: memory does not depend on the length.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "generate/generator.h"
#include "generate/tokenizer.h"
#include "model/language_model.h"
#include "ops/mirrored_tensor.h"

namespace krait {

struct ScorerOptions {
  DType state_dtype = DType::f32;  // or bf16
  int64_t chunk = 0;               // tokens at once; 0: prefill_chunk; 1: as generation steps
};

class Scorer {
 public:
  // Both outlive this.
  Scorer(Context& ctx, const Weights& weights, const ScorerOptions& options = {});

  // Called with the log-probabilities (natural) of the next few tokens; false ends scoring.
  using OnLogprobs = std::function<bool(std::span<const float>)>;

  // score() goes on from here instead of beginning afresh. Throws Error when `before` is of another
  // model.
  void continue_from(SavedConversation before);

  // Log-probability of tokens[1], tokens[2], .. each given all before it; where the text continues
  // another, of tokens[0] too. Throws Error for a token outside the vocabulary, before anything is
  // computed. Returns false when on_logprobs did.
  bool score(std::span<const int32_t> tokens, const OnLogprobs& on_logprobs);
  // After score(): the k most likely continuations with their log-probabilities, most likely first.
  std::vector<std::pair<int32_t, double>> top(size_t k);

  struct Total {
    double loss = 0;     // sum of -log p over the predicted tokens
    int64_t tokens = 0;  // predicted
    int64_t bytes = 0;   // of text that they stand for
  };
  // Adds one text to `total`: every token but the first is predicted once. context 0: given all
  // before it. Else the text is cut into windows of that many tokens, each read from a fresh state;
  // a window predicts the tokens that follow its own. Returns false when keep_going did.
  bool evaluate(std::span<const int32_t> tokens, int64_t context, const Tokenizer& tokenizer,
                Total& total, const std::function<bool()>& keep_going = {});

 private:
  // Scores tokens_[0 .. count), cut into sequences at seq_start_[0 .. num_seqs]; fills loss_ and
  // gives it to the host.
  const float* run(int64_t count, int64_t num_seqs, DecodeState* state);
  void load(std::span<const int32_t> tokens, int64_t begin, int64_t end);

  Context& ctx_;
  const Weights& weights_;
  DecodeState state_;
  SavedConversation before_;  // pending < 0: none
  int32_t last_ = -1;
  int64_t chunk_;                                // tokens at once
  MirroredTensor tokens_, targets_, seq_start_;  // (chunk), (chunk), (chunk + 1)  i32
  MirroredTensor loss_;                          // (chunk)  f32
  MirroredTensor logits_;                        // (1, vocab_size)  f32
  std::vector<float> logprobs_;
};

}  // namespace krait
