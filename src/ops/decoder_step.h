// Decoder step: one token for each of a few sequences through a whole model, from token ids to
// logits, where an engine has a faster way than the ops one by one. What it computes is what
// model/language_model.h's step() and logits() compose, with the same roundings to T between the
// ops:
//   r = embedding[tokens];  for each layer: r += T(block(norm(r)));  logits = norm_f(r) head^T
#pragma once

#include <span>

#include "ops/context.h"

namespace krait {

// A layer's parameters and its part of the state's pool, under the names of model/parameters.h.
struct DecoderLayer {
  Tensor norm;                      // (d_model)            f32
  Tensor in_proj, in_proj_scale;    // (2 d_inner, d_model) T, or i8 with (2 d_inner) f32
  Tensor in_proj_bias;              // (2 d_inner)          f32; none: no bias
  Tensor conv1d_weight;             // (d_inner, d_conv)    f32
  Tensor conv1d_bias;               // (d_inner)            f32; none: no bias
  Tensor x_proj;                    // (dt_rank + 2 d_state, d_inner)  T
  Tensor dt_proj;                   // (d_inner, dt_rank)   T
  Tensor dt_proj_bias;              // (d_inner)            f32
  Tensor A;                         // (d_inner, d_state)   f32
  Tensor D;                         // (d_inner)            f32
  Tensor out_proj, out_proj_scale;  // (d_model, d_inner)   T, or i8 with (d_model) f32
  Tensor out_proj_bias;             // (d_model)            f32; none: no bias
  Tensor conv;                      // (slots, d_conv - 1, d_inner)  f32 or bf16; in and out
  Tensor ssm;                       // (slots, d_inner, d_state)     as conv; in and out
};

struct DecoderStep {
  std::span<const DecoderLayer> layers;
  Tensor tokens;  // (num_seqs)             i32
  // (num_seqs) i32, distinct; none: sequence i uses slot i. Rows without a sequence may share a
  // spare slot: what it holds and the logits of these rows are then undefined, maybe no numbers.
  Tensor slot;
  Tensor embedding;         // (vocab_size, d_model)  T
  Tensor norm_f;            // (d_model)              f32
  Tensor head, head_scale;  // (vocab_size, d_model)  T, or i8 with (vocab_size) f32
  float norm_eps = 1e-5f;
  DType residual_dtype = DType::f32;  // f32 or T
  Tensor logits;                      // (num_seqs, vocab_size)  f32, written
};

// Whether the context's engine has its own way for this step; then decoder_step does it. The bits
// of a sequence do not depend on the others; with batch_invariant not on how many there are,
// either.
bool takes_decoder_step(Context&, const DecoderStep&);
void decoder_step(Context&, const DecoderStep&);

}  // namespace krait
