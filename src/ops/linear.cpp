#include "ops/linear.h"

#include "ops/check.h"
#include "ops/elementwise.h"
#include "ops/engine.h"

namespace krait {

Cost linear_cost(const Linear& op) {
  return {.flops = 2.0 * static_cast<double>(op.x.shape[0]) * static_cast<double>(op.weight.size()),
          .bytes = static_cast<double>(op.x.bytes() + op.weight.bytes() + op.bias.bytes() +
                                       op.y.bytes() + op.weight_scale.bytes())};
}

void check_weight(const Tensor& weight, const Tensor& weight_scale, const Tensor& x) {
  const bool quantized = weight.dtype == DType::i8;
  check_tensor(weight, "weight", quantized ? DType::i8 : x.dtype, {-1, x.shape[1]});
  KRAIT_CHECK(weight.contiguous(), "weight must be contiguous");
  if (quantized)
    check_tensor(weight_scale, "weight_scale", full_precision(x), {weight.shape[0]});
  else
    KRAIT_CHECK(!weight_scale, "weight_scale belongs to weights in 8 bits");
}

void linear_fwd(Context& ctx, const Linear& op) {
  check_tensor(op.x, "x", op.x.dtype, {-1, -1});
  check_weight(op.weight, op.weight_scale, op.x);
  check_optional(op.bias, "bias", full_precision(op.x), {op.weight.shape[0]});
  const DType y = op.y.dtype == op.x.dtype ? op.y.dtype : full_precision(op.x);
  check_tensor(op.y, "y", y, {op.x.shape[0], op.weight.shape[0]});
  ctx.engine().linear_fwd(ctx, op);
}

void linear_bwd(Context& ctx, const Linear& op, const LinearGrad& grad) {
  const DType dtype = grad.dy.dtype, full = full_precision(grad.dy);
  check_tensor(grad.dy, "dy", dtype, {-1, -1});
  const int64_t tokens = grad.dy.shape[0], out_features = grad.dy.shape[1];
  KRAIT_CHECK(op.weight.dtype != DType::i8, "weights in 8 bits have no gradient");
  if (grad.dx) {
    check_tensor(op.weight, "weight", dtype, {out_features, -1});
    KRAIT_CHECK(op.weight.contiguous(), "weight must be contiguous");
    check_tensor(grad.dx, "dx", dtype, {tokens, op.weight.shape[1]});
  }
  if (grad.dweight) {
    check_tensor(op.x, "x", dtype, {tokens, -1});
    check_tensor(grad.dweight, "dweight", full, {out_features, op.x.shape[1]});
    KRAIT_CHECK(grad.dweight.contiguous(), "dweight must be contiguous");
  }
  check_optional(grad.dbias, "dbias", full, {out_features});
  if (tokens == 0 && grad.dweight && !grad.add_dweight) return fill_zero(ctx, grad.dweight);
  ctx.engine().linear_bwd(ctx, op, grad);
}

}  // namespace krait
