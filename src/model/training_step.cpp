// Forward and backward through the whole model, and what is kept between them.
#include <string>

#include "model/pass.h"
#include "ops/cross_entropy.h"
#include "ops/elementwise.h"
#include "ops/embedding.h"
#include "ops/rms_norm.h"

namespace krait {
namespace {

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
