#include "model/language_model.h"

#include <algorithm>
#include <string>

#include "model/pass.h"
#include "ops/cross_entropy.h"
#include "ops/decoder_step.h"
#include "ops/elementwise.h"
#include "ops/embedding.h"
#include "ops/engine.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/selective_scan.h"

namespace krait {

void check_tokens(std::span<const int32_t> tokens, int64_t vocab_size) {
  for (size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= vocab_size)
      throw Error("token outside the vocabulary", "token number " + std::to_string(i),
                  "0 to " + std::to_string(vocab_size - 1), std::to_string(tokens[i]));
}

namespace {

// Inference: one set of activations for all layers, the residual stream in place.
class Inference {
 public:
  Inference(Context& ctx, const Weights& w, const PackedTokens& input, DecodeState* state)
      : ctx_(ctx), scope_(ctx.workspace()), w_(w), input_(input), state_(state) {
    check_input(ctx, w, input.tokens);
    if (state) check_state(w, *state);
    Arena& arena = ctx.workspace();
    residual_ = arena.tensor(residual_dtype(w), {tokens(), w.config.d_model});
    m_ = arena.tensor(w.dtype, {tokens(), w.config.d_model});
    a_ = allocate_activations(ctx, w.config, w.dtype, tokens());
    embedding_fwd(ctx, {.tokens = input.tokens, .weight = w.parameters.embedding, .y = residual_});
  }

  void step(const Tensor& hidden) {
    const Stage all = rows(0, tokens());
    for (int64_t layer = 0; layer < w_.config.n_layer; ++layer) {
      norm(ctx_, all, layer);
      block_step(ctx_, block(all, layer), all.a, all.m);
    }
    norm_f(hidden);
  }

  // Stage after stage through the layers, each a layer behind the one before it, from which it
  // needs the layer's state only. So several stages' products and, behind them all, scans run side
  // by side: a product leaves no room for a scan beside it.
  void forward(const Tensor& hidden) {
    const std::vector<Stage> stages = cut();
    for (size_t first = 0; first < stages.size(); first += static_cast<size_t>(together()))
      pass(std::span(stages).subspan(
          first, std::min(static_cast<size_t>(together()), stages.size() - first)));
    norm_f(hidden);
  }

 private:
  // Some of the tokens.
  struct Stage {
    Tensor residual, m, seq_start;
    BlockActivations a;
  };

  // Stages on their way through the layers at once. With as many more rounds a pass begins and
  // ends, in which fewer meet.
  int64_t together() const { return std::clamp<int64_t>(w_.config.n_layer / 2, 1, 8); }

  void pass(std::span<const Stage> stages) {
    const int64_t count = static_cast<int64_t>(stages.size()), n_layer = w_.config.n_layer;
    for (int64_t round = 0; round < n_layer + count - 1; ++round) {
      const int64_t first = std::max<int64_t>(0, round - n_layer + 1),
                    last = std::min(round, count - 1);
      const auto stage = [&](int64_t i) -> const Stage& { return stages[static_cast<size_t>(i)]; };
      const int beside = static_cast<int>(last - first + 1);
      ctx_.side_by_side(beside, [&](Context& side, int k) {
        const int64_t i = first + k;
        norm(side, stage(i), round - i);
        block_inputs(side, block(stage(i), round - i), stage(i).a);
      });
      ctx_.side_by_side(beside, [&](Context& side, int k) {
        const int64_t i = first + k;
        block_scan(side, block(stage(i), round - i), stage(i).a, beside);
      });
      for (int64_t i = first; i <= last; ++i)
        block_output(ctx_, block(stage(i), round - i), stage(i).a, stage(i).m);
    }
  }

  int64_t tokens() const { return input_.tokens.shape[0]; }

  Stage rows(int64_t begin, int64_t end) const {
    return {residual_.slice(0, begin, end), m_.slice(0, begin, end), input_.seq_start,
            rows_of(a_, begin, end)};
  }

  // One stage where nothing carries a sequence from stage to stage exactly, where a row's bits must
  // not depend on what is beside it, where weights would be widened for each stage, and where too
  // few meet in few layers.
  std::vector<Stage> cut() {
    const int64_t num_seqs = input_.seq_start.shape[0] - 1;
    int64_t each = tokens();
    if (state_ && state_->dtype() == full_precision(w_) && !ctx_.batch_invariant &&
        w_.parameters.layers[0].in_proj.dtype == w_.dtype && together() >= 4)
      each = selective_scan_stage(ctx_, tokens(), num_seqs, w_.config.d_inner, w_.config.d_state);
    if (each == tokens()) return {rows(0, tokens())};
    std::vector<Stage> stages;
    for (int64_t begin = 0; begin < tokens(); begin += each) {
      const int64_t end = std::min(begin + each, tokens());
      stages.push_back(rows(begin, end));
      stages.back().seq_start = ctx_.workspace().tensor(DType::i32, {num_seqs + 1});
      clip_offsets(ctx_, input_.seq_start, begin, end, stages.back().seq_start);
    }
    return stages;
  }

  BlockArguments block(const Stage& stage, int64_t layer) const {
    PackedTokens input = input_;
    input.seq_start = stage.seq_start;
    return block_of(w_, layer, input, state_);
  }

  // Adds what the layer before left in m to the residual stream.
  void norm(Context& ctx, const Tensor& residual, const Tensor& m, const Tensor& weight,
            const Tensor& y) {
    rms_norm_fwd(ctx, {.x = {m},
                       .residual_in = residual,
                       .residual_out = m ? residual : Tensor(),
                       .weight = weight,
                       .y = y,
                       .rstd = {},
                       .eps = w_.config.norm_eps});
  }
  void norm(Context& ctx, const Stage& stage, int64_t layer) {
    norm(ctx, stage.residual, layer > 0 ? stage.m : Tensor(),
         w_.parameters.layers[static_cast<size_t>(layer)].norm, stage.a.n);
  }
  void norm_f(const Tensor& hidden) { norm(ctx_, residual_, m_, w_.parameters.norm_f, hidden); }

  Context& ctx_;
  const Arena::Scope scope_;
  const Weights& w_;
  const PackedTokens& input_;
  DecodeState* state_;
  Tensor residual_;  // (tokens, d_model)  R
  Tensor m_;         // (tokens, d_model)  T  a block's output
  BlockActivations a_;
};

}  // namespace

void forward(Context& ctx, const Weights& weights, const PackedTokens& input, DecodeState* state,
             const Tensor& hidden) {
  KRAIT_CHECK(input.seq_start.rank == 1);
  Inference(ctx, weights, input, state).forward(hidden);
}

void step(Context& ctx, const Weights& weights, const Tensor& tokens, const Tensor& slot,
          DecodeState& state, const Tensor& hidden) {
  const PackedTokens input = {.tokens = tokens, .seq_start = {}, .slot = slot};
  Inference(ctx, weights, input, &state).step(hidden);
}

void logits(Context& ctx, const Weights& weights, const Tensor& hidden, const Tensor& out) {
  linear_fwd(ctx, {.x = hidden,
                   .weight = weights.parameters.head(),
                   .bias = {},
                   .y = out,
                   .weight_scale = weights.parameters.head_scale});
}

namespace {

std::vector<DecoderLayer> decoder_layers(const Weights& w, const DecodeState& state) {
  std::vector<DecoderLayer> layers;
  layers.reserve(w.parameters.layers.size());
  for (const LayerParameters& p : w.parameters.layers) {
    const int64_t layer = static_cast<int64_t>(layers.size());
    const BlockArguments block = block_of(w, layer, {}, &state);
    layers.push_back({.norm = p.norm,
                      .in_proj = p.in_proj,
                      .in_proj_scale = p.in_proj_scale,
                      .in_proj_bias = p.in_proj_bias,
                      .conv1d_weight = p.conv1d_weight,
                      .conv1d_bias = p.conv1d_bias,
                      .x_proj = p.x_proj,
                      .dt_proj = p.dt_proj,
                      .dt_proj_bias = p.dt_proj_bias,
                      .A = block.A,
                      .D = p.D,
                      .out_proj = p.out_proj,
                      .out_proj_scale = p.out_proj_scale,
                      .out_proj_bias = p.out_proj_bias,
                      .conv = block.conv,
                      .ssm = block.ssm});
  }
  return layers;
}

// What an engine's own way is for.
bool usual(const Config& c) { return c.selective_delta && c.selective_B && c.selective_C; }

}  // namespace

void decode(Context& ctx, const Weights& weights, const Tensor& tokens, const Tensor& slot,
            DecodeState& state, const Tensor& logits) {
  if (ctx.engine().decoder_step && usual(weights.config)) {
    check_state(weights, state);
    const std::vector<DecoderLayer> layers = decoder_layers(weights, state);
    const DecoderStep op = {.layers = layers,
                            .tokens = tokens,
                            .slot = slot,
                            .embedding = weights.parameters.embedding,
                            .norm_f = weights.parameters.norm_f,
                            .head = weights.parameters.head(),
                            .head_scale = weights.parameters.head_scale,
                            .norm_eps = weights.config.norm_eps,
                            .residual_dtype = residual_dtype(weights),
                            .logits = logits};
    if (takes_decoder_step(ctx, op)) return decoder_step(ctx, op);
  }
  const Arena::Scope scope(ctx.workspace());
  const Tensor hidden =
      ctx.workspace().tensor(weights.dtype, {tokens.shape[0], weights.config.d_model});
  step(ctx, weights, tokens, slot, state, hidden);
  krait::logits(ctx, weights, hidden, logits);
}

void score(Context& ctx, const Weights& weights, const PackedTokens& input, const Tensor& targets,
           DecodeState* state, const Tensor& loss) {
  const Arena::Scope scope(ctx.workspace());
  const Tensor hidden =
      ctx.workspace().tensor(weights.dtype, {input.tokens.shape[0], weights.config.d_model});
  forward(ctx, weights, input, state, hidden);
  cross_entropy_fwd(ctx, {.x = hidden,
                          .weight = weights.parameters.head(),
                          .targets = targets,
                          .loss = loss,
                          .weight_scale = weights.parameters.head_scale});
}

}  // namespace krait
