// Prompts of equal length, as benchmarks read them. Used by bench_inference.cpp and
// bench_parity.cpp only.
#pragma once

#include <algorithm>
#include <vector>

#include "bench_inference.h"
#include "generate/generator.h"

namespace krait {

// Cut along time into chunks of constant memory, as many tokens together as the generator takes of
// one sequence.
class Prompts {
 public:
  Prompts(Context& ctx, const Weights& w, const ModelBench& bench)
      : ctx_(ctx), w_(w), sequences_(bench.batch), tokens_(bench.prompt) {
    at_once_ = std::clamp<int64_t>(prefill_chunk(ctx.engine()) / sequences_, 1, tokens_);
    hidden_ = OwnedTensor(w.dtype, {sequences_ * at_once_, w.config.d_model}, ctx.memory());
    for (const int64_t length : {at_once_, tokens_ % at_once_}) {
      const std::vector<int32_t> tokens = some_tokens(w.config, sequences_ * length);
      std::vector<int32_t> start;
      for (int64_t i = 0; i <= sequences_; ++i) start.push_back(static_cast<int32_t>(i * length));
      chunks_.push_back({OwnedTensor(DType::i32, {sequences_ * length}, ctx.memory()),
                         OwnedTensor(DType::i32, {sequences_ + 1}, ctx.memory())});
      chunks_.back().tokens.upload(tokens.data());
      chunks_.back().seq_start.upload(start.data());
    }
  }

  int64_t chunks() const { return (tokens_ + at_once_ - 1) / at_once_; }
  int64_t tokens_before(int64_t chunk) const { return std::min(tokens_, chunk * at_once_); }

  void read(DecodeState& state, int64_t first_chunk, int64_t end_chunk) {
    for (int64_t i = first_chunk; i < end_chunk; ++i) {
      const Chunk& chunk = chunks_[tokens_before(i + 1) - tokens_before(i) == at_once_ ? 0 : 1];
      forward(ctx_, w_, {.tokens = chunk.tokens, .seq_start = chunk.seq_start, .slot = {}}, &state,
              hidden_->slice(0, 0, chunk.tokens->shape[0]));
    }
  }

  // (sequences, d_model), rows strided: behind the last token of each.
  Tensor last_hidden() const {
    const int64_t length = tokens_ - tokens_before(chunks() - 1);
    Tensor rows = hidden_->slice(0, length - 1, sequences_ * length);
    rows.shape[0] = sequences_;
    rows.stride[0] *= length;
    return rows;
  }

  // Of the first chunk, sequence after sequence: (sequences tokens_before(1), d_model).
  const Tensor& hidden() const { return hidden_.view(); }

 private:
  // The same number of tokens of each sequence, sequence after sequence.
  struct Chunk {
    OwnedTensor tokens, seq_start;
  };

  Context& ctx_;
  const Weights& w_;
  int64_t sequences_, tokens_, at_once_;
  std::vector<Chunk> chunks_;  // a whole one, and the last one
  OwnedTensor hidden_;
};

}  // namespace krait
