#include "ops/rms_norm.h"

#include "ops/check.h"
#include "ops/engine.h"

namespace krait {
namespace {

// R: T itself or full precision.
void check_residual(const Tensor& r, const char* name, const Tensor& like, int64_t tokens,
                    int64_t d_model) {
  check_tensor(r, name, r.dtype == like.dtype ? r.dtype : full_precision(like), {tokens, d_model});
}

void check_addends(const RmsNorm& op, DType type, int64_t tokens, int64_t d_model) {
  for (size_t k = 0; k < op.x.size(); ++k) {
    check_optional(op.x[k], "x", type, {tokens, d_model});
    KRAIT_CHECK(!op.x[k] || k == 0 || op.x[k - 1], "an x behind none");
  }
}

}  // namespace

int addends(const RmsNorm& op) {
  int count = 0;
  while (count < kMaxAddends && op.x[static_cast<size_t>(count)]) ++count;
  return count;
}

Cost rms_norm_cost(const RmsNorm& op) {
  const double n = static_cast<double>(op.y.size());
  double bytes = 0;
  for (const Tensor& x : op.x) bytes += static_cast<double>(x.bytes());
  for (const Tensor* t : {&op.residual_in, &op.residual_out, &op.weight, &op.y, &op.rstd})
    bytes += static_cast<double>(t->bytes());
  return {.flops = 5 * n, .bytes = bytes};
}

void rms_norm_fwd(Context& ctx, const RmsNorm& op) {
  check_tensor(op.y, "y", op.y.dtype, {-1, -1});
  const int64_t tokens = op.y.shape[0], d_model = op.y.shape[1];
  const DType full = full_precision(op.y);
  check_addends(op, op.y.dtype, tokens, d_model);
  check_residual(op.residual_in, "residual_in", op.y, tokens, d_model);
  check_optional(op.residual_out, "residual_out", op.residual_in.dtype, {tokens, d_model});
  check_tensor(op.weight, "weight", full, {d_model});
  check_optional(op.rstd, "rstd", full, {tokens});
  ctx.engine().rms_norm_fwd(ctx, op);
}

void rms_norm_bwd(Context& ctx, const RmsNorm& op, const RmsNormGrad& grad) {
  check_tensor(grad.dy, "dy", grad.dy.dtype, {-1, -1});
  const int64_t tokens = grad.dy.shape[0], d_model = grad.dy.shape[1];
  const DType full = full_precision(grad.dy);
  const Tensor& r = op.residual_out ? op.residual_out : op.residual_in;
  check_residual(r, "residual", grad.dy, tokens, d_model);
  check_addends(op, grad.dy.dtype, tokens, d_model);
  check_tensor(op.rstd, "rstd", full, {tokens});
  check_tensor(op.weight, "weight", full, {d_model});
  check_tensor(grad.dresidual, "dresidual", r.dtype, {tokens, d_model});
  check_optional(grad.dx, "dx", grad.dy.dtype, {tokens, d_model});
  check_tensor(grad.dweight, "dweight", full, {d_model});
  check_optional(grad.y, "y", grad.dy.dtype, {tokens, d_model});
  ctx.engine().rms_norm_bwd(ctx, op, grad);
}

}  // namespace krait
