// Forward and backward through the whole model, and what is kept between them.
#include <string>

#include "model/pass.h"
#include "ops/cross_entropy.h"
#include "ops/elementwise.h"
#include "ops/embedding.h"
#include "ops/rms_norm.h"

namespace krait {
namespace {

// What the forward pass of a training step leaves for the backward pass. The residual stream is
// kept before every second or fourth block; elsewhere it is what was kept last and the outputs m of
// the blocks since then, in half the memory, which the norms' passes add up.
struct Saved {
  Tensor residual;     // (tokens, d_model)  R  the block's input before the norm; none: not kept
  Tensor rstd;         // (tokens)
  Tensor m;            // (tokens, d_model)  T  the block's output; shared if not kept
  Tensor conv, ssm;    // the layer's state before the step; none without state
  BlockActivations a;  // n and y are shared, and what is computed again
};

class TrainingStep {
 public:
  TrainingStep(Context& ctx, const Weights& w, const TrainingBatch& batch,
               const Parameters& gradients)
      : ctx_(ctx), arena_(ctx.workspace()), w_(w), batch_(batch), gradients_(gradients) {}

  void run(const Tensor& loss) {
    const Arena::Scope scope(arena_);
    allocate();
    {
      const Arena::Scope blocks(arena_);  // what they share makes room for the head
      share();
      forward();
    }
    head(loss);
    share();
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
  // Of the stream that was kept at `from` and the outputs since then.
  RmsNorm norm_op(size_t i, size_t from, const Tensor& y) const {
    RmsNorm op;
    for (size_t k = from; k < i; ++k) op.x[k - from] = saved_[k].m;
    op.residual_in = saved_[from].residual;
    op.weight = i < blocks() ? w_.parameters.layers[i].norm : w_.parameters.norm_f;
    op.y = y;
    op.rstd = saved_[i].rstd;
    op.eps = w_.config.norm_eps;
    return op;
  }
  Tensor copy_of(const Tensor& t) {
    Tensor copy = t;
    if (t) copy.data = arena_.allocate(t.bytes());
    return copy;
  }

  size_t blocks() const { return static_cast<size_t>(w_.config.n_layer); }
  // Blocks from one kept residual stream to the next: the more, the less memory a block takes, and
  // the more tensors the norms' passes read.
  size_t group() const { return batch_.recompute == Recompute::none ? 2 : kMaxAddends; }
  bool keeps_residual(size_t i) const { return i % group() == 0 && (i == 0 || i < blocks()); }
  size_t last_kept(size_t i) const { return keeps_residual(i) ? i : (i - 1) / group() * group(); }
  // Whether its output is part of a stream that is not kept; the last one stays where it is.
  bool keeps_output(size_t i) const { return i + 1 < blocks() && !keeps_residual(i + 1); }

  // What is kept of every block.
  void allocate() {
    const Config& c = w_.config;
    m_ = activation(w_.dtype);
    n_ = activation(w_.dtype);
    saved_.resize(blocks() + 1);
    for (size_t i = 0; i < saved_.size(); ++i) {
      Saved& s = saved_[i];
      if (keeps_residual(i)) s.residual = activation(residual_dtype(w_));
      s.rstd = arena_.tensor(full_precision(w_), {tokens()});
      if (i == blocks()) continue;  // norm_f's
      s.m = keeps_output(i) ? activation(w_.dtype) : m_;
      s.a.n = n_;
      if (batch_.recompute != Recompute::full)
        allocate_products(ctx_, c, w_.dtype, tokens(), /*saved=*/true, s.a);
      if (batch_.recompute == Recompute::none)
        allocate_scan_inputs(ctx_, c, w_.dtype, tokens(), s.a);
      const BlockArguments block =
          block_of(w_, static_cast<int64_t>(i), batch_.input, batch_.state);
      s.conv = copy_of(block.conv);
      s.ssm = copy_of(block.ssm);
    }
  }

  // What blocks share.
  void share() {
    const Config& c = w_.config;
    BlockActivations shared;
    shared.y = arena_.tensor(w_.dtype, {tokens(), c.d_inner});
    if (batch_.recompute != Recompute::none)
      allocate_scan_inputs(ctx_, c, w_.dtype, tokens(), shared);
    if (batch_.recompute == Recompute::full)
      allocate_products(ctx_, c, w_.dtype, tokens(), /*saved=*/false, shared);
    for (size_t i = 0; i < blocks(); ++i) {
      BlockActivations& a = saved_[i].a;
      a.y = shared.y;
      if (shared.u) a.u = shared.u, a.dt = shared.dt;
      if (shared.xz) a.xz = shared.xz, a.x_dbl = shared.x_dbl;
    }
  }

  void forward() {
    embedding_fwd(ctx_, embedding());
    for (size_t i = 0; i < blocks(); ++i) {
      const Saved& s = saved_[i];
      RmsNorm norm = norm_op(i, last_kept(i > 0 ? i - 1 : 0), s.a.n);
      if (i > 0) norm.residual_out = s.residual;
      rms_norm_fwd(ctx_, norm);
      const BlockArguments block =
          block_of(w_, static_cast<int64_t>(i), batch_.input, batch_.state);
      if (batch_.state) {
        copy_elements(ctx_, block.conv, s.conv);
        copy_elements(ctx_, block.ssm, s.ssm);
      }
      block_forward(ctx_, block, s.a, s.m);
    }
    rms_norm_fwd(ctx_, norm_op(blocks(), last_kept(blocks()), n_));  // free behind the last block
  }

  // Loss and the gradient of everything from the last block's output on.
  void head(const Tensor& loss) {
    const Tensor& dweight = gradients_.head();
    cross_entropy_bwd(
        ctx_, {.x = n_, .weight = w_.parameters.head(), .targets = batch_.targets, .loss = loss},
        {.scale = batch_.loss_scale, .dx = n_, .dweight = dweight, .add_dweight = !batch_.fresh});
    dresidual_ = activation(residual_dtype(w_));
    dm_ = dresidual_.dtype == w_.dtype ? dresidual_ : m_;
    fill_zero(ctx_, dresidual_);
    norm_backward(blocks(), gradients_.norm_f, {});
  }

  // From n_, the gradient of this norm's output, and dresidual_ to that of its inputs; dm_ gets the
  // copy that out_proj's gradient reads. y: gets its output once more, or none.
  void norm_backward(size_t i, const Tensor& dweight, const Tensor& y) {
    const bool copy = i > 0 && dm_.data != dresidual_.data;
    rms_norm_bwd(ctx_, norm_op(i, last_kept(i), {}),
                 {.dy = n_,
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
    const bool full = batch_.recompute == Recompute::full;
    if (full) rms_norm_fwd(ctx_, norm_op(i, last_kept(i), n_));
    if (batch_.recompute != Recompute::none) block_recompute(ctx_, block, saved_[i].a, full);
    block_backward(ctx_, block, saved_[i].a,
                   {.parameters = gradients_.layers[i],
                    .dm = dm_,
                    .dn = n_,
                    .dconv = batch_.dstate ? batch_.dstate->conv(layer) : Tensor(),
                    .dssm = batch_.dstate ? batch_.dstate->ssm(layer) : Tensor(),
                    .fresh = batch_.fresh},
                   [&] { norm_backward(i, gradients_.layers[i].norm, n_); });
  }

  Context& ctx_;
  Arena& arena_;
  const Weights& w_;
  const TrainingBatch& batch_;
  const Parameters& gradients_;
  std::vector<Saved> saved_;  // one per block, and norm_f's
  Tensor m_;  // (tokens, d_model)  T  outputs that are not kept, the last one's among them; then
              // dm_
  Tensor n_;  // (tokens, d_model)  T  a normed input, or its gradient
  Tensor dresidual_;  // (tokens, d_model)  R  gradient of the residual stream where the backward
                      // pass stands
  Tensor dm_;         // (tokens, d_model)  T  of a block's output
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
