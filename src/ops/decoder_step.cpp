#include "ops/decoder_step.h"

#include "ops/check.h"
#include "ops/engine.h"

namespace krait {
namespace {

void check_dense(const Tensor& t, const char* name) {
  KRAIT_CHECK(t.contiguous(), std::string(name) + " must be contiguous");
}

// A matrix of T, or of i8 with scales.
void check_matrix(const Tensor& weight, const Tensor& scale, const char* name, DType dtype,
                  int64_t rows, int64_t columns) {
  check_tensor(weight, name, scale ? DType::i8 : dtype, {rows, columns});
  check_dense(weight, name);
  check_optional(scale, name, DType::f32, {rows});
}

// first: the first layer, whose shapes all have.
void check_layer(const Context& ctx, const DecoderLayer& l, const DecoderLayer& first, DType dtype,
                 int64_t num_seqs, int64_t d_model, const Tensor& slot) {
  check_tensor(l.D, "D", DType::f32, {-1});
  const int64_t d_inner = l.D.shape[0];
  check_tensor(l.norm, "norm", DType::f32, {d_model});
  check_matrix(l.in_proj, l.in_proj_scale, "in_proj", dtype, 2 * d_inner, d_model);
  check_optional(l.in_proj_bias, "in_proj_bias", DType::f32, {2 * d_inner});
  check_tensor(l.conv1d_weight, "conv1d_weight", DType::f32, {d_inner, -1});
  check_optional(l.conv1d_bias, "conv1d_bias", DType::f32, {d_inner});
  check_tensor(l.dt_proj, "dt_proj", dtype, {d_inner, -1});
  check_tensor(l.dt_proj_bias, "dt_proj_bias", DType::f32, {d_inner});
  check_tensor(l.A, "A", DType::f32, {d_inner, -1});
  const int64_t dt_rank = l.dt_proj.shape[1], d_state = l.A.shape[1];
  check_tensor(l.x_proj, "x_proj", dtype, {dt_rank + 2 * d_state, d_inner});
  check_matrix(l.out_proj, l.out_proj_scale, "out_proj", dtype, d_model, d_inner);
  check_optional(l.out_proj_bias, "out_proj_bias", DType::f32, {d_model});
  const DType states = l.ssm.dtype == DType::bf16 ? DType::bf16 : DType::f32;
  check_tensor(l.conv, "conv", states, {-1, l.conv1d_weight.shape[1] - 1, d_inner});
  check_tensor(l.ssm, "ssm", states, {l.conv.shape[0], d_inner, d_state});
  check_slots(ctx, slot, l.ssm, num_seqs);
  check_dense(l.conv1d_weight, "conv1d_weight");
  check_dense(l.x_proj, "x_proj");
  check_dense(l.dt_proj, "dt_proj");
  check_dense(l.A, "A");
  check_dense(l.conv, "conv");
  check_dense(l.ssm, "ssm");
  KRAIT_CHECK(l.A.shape == first.A.shape && l.dt_proj.shape == first.dt_proj.shape &&
                  l.conv1d_weight.shape == first.conv1d_weight.shape &&
                  l.in_proj.dtype == first.in_proj.dtype && l.ssm.dtype == first.ssm.dtype,
              "layers differ in shape or type");
}

}  // namespace

bool takes_decoder_step(Context& ctx, const DecoderStep& op) {
  return ctx.engine().takes_decoder_step && ctx.engine().takes_decoder_step(ctx, op);
}

void decoder_step(Context& ctx, const DecoderStep& op) {
  const DType dtype = op.embedding.dtype;
  check_tensor(op.tokens, "tokens", DType::i32, {-1});
  const int64_t num_seqs = op.tokens.shape[0];
  check_tensor(op.embedding, "embedding", dtype, {-1, -1});
  check_dense(op.embedding, "embedding");
  const int64_t vocab_size = op.embedding.shape[0], d_model = op.embedding.shape[1];
  check_tensor(op.norm_f, "norm_f", DType::f32, {d_model});
  check_matrix(op.head, op.head_scale, "head", dtype, vocab_size, d_model);
  check_tensor(op.logits, "logits", DType::f32, {num_seqs, vocab_size});
  KRAIT_CHECK(op.residual_dtype == DType::f32 || op.residual_dtype == dtype,
              "residual_dtype must be f32 or T");
  KRAIT_CHECK(!op.layers.empty());
  for (const DecoderLayer& l : op.layers)
    check_layer(ctx, l, op.layers[0], dtype, num_seqs, d_model, op.slot);
  ctx.engine().decoder_step(ctx, op);
}

}  // namespace krait
