#include "model/language_model.h"

#include <string>

#include "model/mamba_block.h"
#include "ops/cross_entropy.h"
#include "ops/decoder_step.h"
#include "ops/elementwise.h"
#include "ops/embedding.h"
#include "ops/engine.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"

namespace krait {

void check_tokens(std::span<const int32_t> tokens, int64_t vocab_size) {
  for (size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= vocab_size)
      throw Error("token outside the vocabulary", "token number " + std::to_string(i),
                  "0 to " + std::to_string(vocab_size - 1), std::to_string(tokens[i]));
}

namespace {

DType full_precision(const Weights& w) { return w.dtype == DType::f64 ? DType::f64 : DType::f32; }
DType residual_dtype(const Weights& w) {
  return w.config.residual_in_fp32 ? full_precision(w) : w.dtype;
}

// Where the host can look.
void check_input(const Context& ctx, const Weights& w, const Tensor& tokens) {
  if (ctx.memory().on_host())
    check_tokens({tokens.ptr<int32_t>(), static_cast<size_t>(tokens.shape[0])},
                 w.config.vocab_size);
}

void check_state(const Weights& w, const DecodeState& state) {
  KRAIT_CHECK(state.dtype() == full_precision(w) || state.dtype() == DType::bf16,
              std::string("the state is ") + name_of(state.dtype()));
  KRAIT_CHECK(state.matches(w.config), "the state belongs to another model");
}

BlockArguments block_of(const Weights& w, int64_t layer, const PackedTokens& input,
                        const DecodeState* state) {
  return {.config = w.config,
          .parameters = w.parameters.layers[static_cast<size_t>(layer)],
          .A = w.A.slice(0, layer, layer + 1).reshape({w.config.d_inner, w.config.d_state}),
          .seq_start = input.seq_start,
          .slot = input.slot,
          .conv = state ? state->conv(layer) : Tensor(),
          .ssm = state ? state->ssm(layer) : Tensor()};
}

// Inference: one set of activations for all layers, the residual stream in place.
template <class Block>
void run(Context& ctx, const Weights& w, const PackedTokens& input, DecodeState* state,
         const Tensor& hidden, Block block) {
  const Config& c = w.config;
  check_input(ctx, w, input.tokens);
  if (state) check_state(w, *state);
  const int64_t tokens = input.tokens.shape[0];
  Arena& arena = ctx.workspace();
  const Arena::Scope scope(arena);
  const Tensor residual = arena.tensor(residual_dtype(w), {tokens, c.d_model});
  const Tensor m = arena.tensor(w.dtype, {tokens, c.d_model});
  const BlockActivations a = allocate_activations(ctx, c, w.dtype, tokens);
  embedding_fwd(ctx, {.tokens = input.tokens, .weight = w.parameters.embedding, .y = residual});
  const auto norm = [&](const Tensor& weight, const Tensor& x, const Tensor& y) {
    rms_norm_fwd(ctx, {.x = x,
                       .residual_in = residual,
                       .residual_out = x ? residual : Tensor(),
                       .weight = weight,
                       .y = y,
                       .rstd = {},
                       .eps = c.norm_eps});
  };
  for (int64_t layer = 0; layer < c.n_layer; ++layer) {
    const BlockArguments arguments = block_of(w, layer, input, state);
    norm(arguments.parameters.norm, layer > 0 ? m : Tensor(), a.n);
    block(ctx, arguments, a, m);
  }
  norm(w.parameters.norm_f, m, hidden);
}

// What the forward pass of a training step leaves for the backward pass. When it computes anything
// again, every other tensor of the residual stream is kept; the one behind it is that plus the
// block's output m, in half the memory.
struct Saved {
  Tensor residual;   // (tokens, d_model)  R  the block's input before the norm; shared if not kept
  Tensor rstd;       // (tokens)
  Tensor m;          // (tokens, d_model)  T  the block's output; shared if not kept
  Tensor conv, ssm;  // the layer's state before the step; none without state
  BlockActivations a;  // n and y are shared, and what is computed again
};

class TrainingStep {
 public:
  TrainingStep(Context& ctx, const Weights& w, const TrainingBatch& batch,
               const Parameters& gradients)
      : ctx_(ctx), arena_(ctx.workspace()), w_(w), batch_(batch), gradients_(gradients) {}

  void run(const Tensor& loss) {
    const Arena::Scope scope(arena_);
    forward();
    head(loss);
    for (int64_t layer = w_.config.n_layer - 1; layer >= 0; --layer) backward(layer);
    embedding_bwd(ctx_, embedding(), {.dy = dresidual_, .dweight = gradients_.embedding});
  }

 private:
  int64_t tokens() const { return batch_.input.tokens.shape[0]; }
  Tensor activation(DType dtype) { return arena_.tensor(dtype, {tokens(), w_.config.d_model}); }
  Embedding embedding() const {
    return {
        .tokens = batch_.input.tokens, .weight = w_.parameters.embedding, .y = saved_[0].residual};
  }
  RmsNorm norm_op(size_t i, const Tensor& y) const {
    const int64_t layer = static_cast<int64_t>(i);
    return {
        .x = layer > 0 ? saved_[i - 1].m : Tensor(),
        .residual_in = saved_[i > 0 ? i - 1 : 0].residual,
        .residual_out = saved_[i].residual,
        .weight = layer < w_.config.n_layer ? w_.parameters.layers[i].norm : w_.parameters.norm_f,
        .y = y,
        .rstd = saved_[i].rstd,
        .eps = w_.config.norm_eps};
  }
  Tensor keep(const Tensor& t) {
    Tensor copy = t;
    copy.data = arena_.allocate(t.bytes());
    copy_elements(ctx_, t, copy);
    return copy;
  }

  bool keeps_residual(size_t i) const { return batch_.recompute == Recompute::none || i % 2 == 0; }
  // Its output, from which the stream behind the block comes that is not kept.
  bool keeps_output(size_t i) const { return batch_.recompute != Recompute::none && i % 2 == 0; }

  void allocate() {
    const Config& c = w_.config;
    const bool none = batch_.recompute == Recompute::none,
               full = batch_.recompute == Recompute::full;
    m_ = activation(w_.dtype);
    shared_ = allocate_inputs(ctx_, c, w_.dtype, tokens());
    shared_.y = arena_.tensor(w_.dtype, {tokens(), c.d_inner});
    if (full) shared_ = allocate_products(ctx_, c, shared_, /*saved=*/false);
    const Tensor residual = none ? Tensor() : activation(residual_dtype(w_));
    saved_.resize(static_cast<size_t>(c.n_layer) + 1);
    for (size_t i = 0; i < saved_.size(); ++i) {
      Saved& s = saved_[i];
      s.residual = keeps_residual(i) ? activation(residual_dtype(w_)) : residual;
      s.rstd = arena_.tensor(full_precision(w_), {tokens()});
      if (i + 1 == saved_.size()) continue;  // norm_f's
      s.m = keeps_output(i) ? activation(w_.dtype) : m_;
      s.a = full ? shared_ : allocate_products(ctx_, c, shared_, /*saved=*/true);
      if (none && i > 0) allocate_scan_inputs(ctx_, c, s.a);  // the first one has the shared ones
    }
  }

  void forward() {
    allocate();
    embedding_fwd(ctx_, embedding());
    for (int64_t layer = 0; layer < w_.config.n_layer; ++layer) {
      Saved& s = saved_[static_cast<size_t>(layer)];
      rms_norm_fwd(ctx_, norm_op(static_cast<size_t>(layer), s.a.n));
      const BlockArguments block = block_of(w_, layer, batch_.input, batch_.state);
      if (batch_.state) {
        s.conv = keep(block.conv);
        s.ssm = keep(block.ssm);
      }
      block_forward(ctx_, block, s.a, s.m);
    }
    hidden_ = shared_.n;  // free behind the last block
    rms_norm_fwd(ctx_, norm_op(saved_.size() - 1, hidden_));
  }

  // Loss and the gradient of everything from the last block's output on.
  void head(const Tensor& loss) {
    const Tensor dhidden = activation(w_.dtype);
    const Tensor& dweight = gradients_.head();
    cross_entropy_bwd(
        ctx_,
        {.x = hidden_, .weight = w_.parameters.head(), .targets = batch_.targets, .loss = loss},
        {.scale = batch_.loss_scale,
         .dx = dhidden,
         .dweight = dweight,
         .add_dweight = !batch_.fresh});
    dresidual_ = activation(residual_dtype(w_));
    fill_zero(ctx_, dresidual_);
    dm_ = dresidual_.dtype == w_.dtype ? dresidual_ : m_;
    dn_ = dhidden;
    norm_backward(saved_.size() - 1, gradients_.norm_f, {});
  }

  // The block's input once more, where it is not kept, and its normed input.
  void norm_again(size_t i) {
    RmsNorm op = norm_op(i, saved_[i].a.n);
    if (keeps_residual(i)) {
      op.x = op.residual_out = op.rstd = {};
      op.residual_in = saved_[i].residual;
    }
    rms_norm_fwd(ctx_, op);
  }

  // From dn_ and dresidual_ of this norm's output to those of its inputs; dm_ gets the copy that
  // out_proj's gradient reads. y: gets its output once more, or none.
  void norm_backward(size_t i, const Tensor& dweight, const Tensor& y) {
    const bool copy = i > 0 && dm_.data != dresidual_.data;
    rms_norm_bwd(ctx_, norm_op(i, {}),
                 {.dy = dn_,
                  .dresidual = dresidual_,
                  .dx = copy ? dm_ : Tensor(),
                  .dweight = dweight,
                  .y = y});
  }

  void backward(int64_t layer) {
    const size_t i = static_cast<size_t>(layer);
    BlockArguments block = block_of(w_, layer, batch_.input, nullptr);
    block.conv = saved_[i].conv;
    block.ssm = saved_[i].ssm;
    // Where the block's input is kept and nothing else reads the normed one, the norm's backward
    // pass gives that besides.
    const bool none = batch_.recompute == Recompute::none;
    if (!none) {
      norm_again(i);
      block_recompute(ctx_, block, saved_[i].a, /*products=*/batch_.recompute == Recompute::full);
    }
    block_backward(
        ctx_, block, saved_[i].a,
        {.parameters = gradients_.layers[i],
         .dm = dm_,
         .dn = dn_,
         .dconv = batch_.dstate ? batch_.dstate->conv(layer) : Tensor(),
         .dssm = batch_.dstate ? batch_.dstate->ssm(layer) : Tensor(),
         .fresh = batch_.fresh},
        [&] { norm_backward(i, gradients_.layers[i].norm, none ? saved_[i].a.n : Tensor()); });
  }

  Context& ctx_;
  Arena& arena_;
  const Weights& w_;
  const TrainingBatch& batch_;
  const Parameters& gradients_;
  std::vector<Saved> saved_;  // one per block, and norm_f's
  BlockActivations shared_;   // by all blocks
  Tensor m_;                  // (tokens, d_model)  T  outputs that are not kept; then dm_
  Tensor hidden_;             // (tokens, d_model)  T
  Tensor dresidual_;  // (tokens, d_model)  R  gradient of the residual stream where the backward
                      // pass stands
  Tensor dm_, dn_;    // (tokens, d_model)  T  of a block's output and of its normed input
};

}  // namespace

Recompute recompute_from_name(const std::string& name) {
  if (name == "none") return Recompute::none;
  if (name == "light") return Recompute::light;
  if (name == "full") return Recompute::full;
  throw Error("unknown level", "recompute", "none, light or full", in_quotes(name));
}

void forward(Context& ctx, const Weights& weights, const PackedTokens& input, DecodeState* state,
             const Tensor& hidden) {
  KRAIT_CHECK(input.seq_start.rank == 1);
  run(ctx, weights, input, state, hidden, block_forward);
}

void step(Context& ctx, const Weights& weights, const Tensor& tokens, const Tensor& slot,
          DecodeState& state, const Tensor& hidden) {
  run(ctx, weights, {.tokens = tokens, .seq_start = {}, .slot = slot}, &state, hidden, block_step);
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

void forward_backward(Context& ctx, const Weights& weights, const TrainingBatch& batch,
                      const Parameters& gradients, const Tensor& loss) {
  check_input(ctx, weights, batch.input.tokens);
  KRAIT_CHECK(!batch.dstate || batch.state, "dstate needs state");
  for (const DecodeState* state : {batch.state, batch.dstate}) {
    if (!state) continue;
    check_state(weights, *state);
    KRAIT_CHECK(state->dtype() == full_precision(weights), "training is in full precision");
  }
  TrainingStep(ctx, weights, batch, gradients).run(loss);
}

void clear_added(Context& ctx, const Config& config, const ParameterStore& gradients) {
  fill_zero(ctx, gradients.behind_matrices());
  // A tied embedding's is the head's, too.
  if (!config.tie_embeddings) fill_zero(ctx, gradients.parameters().embedding);
}

}  // namespace krait
