// The Mamba language model, written once over the ops: embedding, n_layer blocks (mamba_block.h),
// norm_f, head. It runs on whatever engine the context has. Temporary memory comes from
// ctx.workspace(): a steady loop allocates nothing.
#pragma once

#include <cstdint>
#include <span>

#include "model/decode_state.h"
#include "model/weights.h"
#include "ops/context.h"

namespace krait {

// Sequences laid end to end; nothing passes from one to the next.
struct PackedTokens {
  Tensor tokens;     // (tokens)        i32, in [0, vocab_size)
  Tensor seq_start;  // (num_seqs + 1)  i32, from 0 to tokens, not decreasing
  Tensor slot;  // (num_seqs)      i32, distinct: the state's slot of each sequence; none: sequence
                // i uses slot i
};

// Throws Error when a token is outside the vocabulary. Whoever takes tokens from outside and hands
// them to an engine whose memory the host cannot read calls this; the functions below check the
// others.
void check_tokens(std::span<const int32_t> tokens, int64_t vocab_size);

// hidden: (tokens, d_model) T, written: the output of norm_f for every token.
// state: in: where each sequence stands, out: where it stands after these tokens, so a long text
// goes through in chunks; null: sequences start from nothing and nothing is kept. A state in bf16
// is rounded behind the last of the tokens only. Throws Error when a token is outside the
// vocabulary.
void forward(Context& ctx, const Weights& weights, const PackedTokens& input, DecodeState* state,
             const Tensor& hidden);

// One token for each sequence. tokens: (num_seqs) i32; slot: (num_seqs) i32, none: sequence i uses
// slot i; hidden: (num_seqs, d_model) T. Slots are distinct, but for a spare one that rows without
// a sequence share on engines whose memory the host cannot read (where sample_tokens puts rows that
// have ended): what it holds and the hidden rows are then undefined, and nothing else is touched.
void step(Context& ctx, const Weights& weights, const Tensor& tokens, const Tensor& slot,
          DecodeState& state, const Tensor& hidden);

// hidden: (rows, d_model) T, rows may be strided; out: (rows, vocab_size) f32 (f64 with T = f64),
// written.
void logits(Context& ctx, const Weights& weights, const Tensor& hidden, const Tensor& out);

// step(), then logits() of each sequence: (num_seqs, vocab_size) f32 (f64 with T = f64), written.
// Where the engine has its own way for the whole of it (ops/decoder_step.h), that way.
void decode(Context& ctx, const Weights& weights, const Tensor& tokens, const Tensor& slot,
            DecodeState& state, const Tensor& logits);

// Cross entropy of the targets, natural log. targets: (tokens) i32, negative: not scored; loss:
// (tokens) f32, 0 where not scored. The logits never exist all at once.
void score(Context& ctx, const Weights& weights, const PackedTokens& input, const Tensor& targets,
           DecodeState* state, const Tensor& loss);

// What the backward pass computes again instead of having it kept: less memory, more work, the same
// bits. none: normed inputs and every other tensor of the residual stream, which costs nothing;
// light: also the convolutions, dt_proj and three of four tensors of the stream, which costs
// little; full: all but every fourth tensor of the stream and what blocks add to it.
enum class Recompute { none, light, full };
Recompute recompute_from_name(const std::string& name);  // throws Error for another name

struct TrainingBatch {
  PackedTokens input;
  Tensor targets;  // (tokens) i32; negative: not scored
  float loss_scale =
      1;  // gradient of the objective by each token's loss, e.g. 1 / number of targets
  DecodeState* state = nullptr;  // f32; in: initial, out: final; null: sequences start from nothing
  DecodeState* dstate = nullptr;  // in: gradient of the final state, out: of the initial one; needs
                                  // `state`; null: zero, not wanted
  Recompute recompute = Recompute::none;
  // The gradients of in_proj, x_proj, dt_proj, out_proj and the head are written, whatever they
  // held; all others are added to, always.
  bool fresh = false;
};

// Forward and backward. gradients: as the parameters, all f32 (f64 with T = f64), added to. loss:
// (tokens) f32 (f64), written. Activations are kept in ctx.workspace(): O(tokens x width), with
// Recompute::full O(tokens x d_model) a layer.
void forward_backward(Context& ctx, const Weights& weights, const TrainingBatch& batch,
                      const Parameters& gradients, const Tensor& loss);

// Zeros those gradients that a fresh batch adds to.
void clear_added(Context& ctx, const Config& config, const ParameterStore& gradients);

}  // namespace krait
