#include "ops/causal_conv1d.h"

#include "ops/check.h"
#include "ops/engine.h"

namespace krait {
namespace {

struct Shape {
  int64_t tokens, d_inner, d_conv;
};

Shape check_inputs(const CausalConv1d& op) {
  const DType full = full_precision(op.x);
  check_tensor(op.x, "x", op.x.dtype, {-1, -1});
  check_tensor(op.weight, "weight", full, {op.x.shape[1], -1});
  const Shape s = {op.x.shape[0], op.x.shape[1], op.weight.shape[1]};
  KRAIT_CHECK(s.d_conv >= 2 && s.d_conv <= 4, "d_conv is " + std::to_string(s.d_conv));
  check_optional(op.bias, "bias", full, {s.d_inner});
  check_state(op.state, full, {-1, s.d_conv - 1, s.d_inner});
  KRAIT_CHECK(op.weight.contiguous());
  return s;
}

}  // namespace

Cost causal_conv1d_cost(const CausalConv1d& op) {
  const double elements = static_cast<double>(op.x.size());
  return {.flops = elements * (2.0 * static_cast<double>(op.weight.shape[1]) + 4),
          .bytes = elements * 2 * static_cast<double>(size_of(op.x.dtype)),
          .exps = op.silu ? elements : 0};
}

void causal_conv1d_fwd(Context& ctx, const CausalConv1d& op) {
  const Shape s = check_inputs(op);
  check_tensor(op.y, "y", op.x.dtype, {s.tokens, s.d_inner});
  check_sequences(ctx, op.seq_start, op.slot, op.state, s.tokens);
  if (s.tokens > 0) ctx.engine().causal_conv1d_fwd(ctx, op);
}

void causal_conv1d_bwd(Context& ctx, const CausalConv1d& op, const CausalConv1dGrad& grad) {
  const Shape s = check_inputs(op);
  const DType full = full_precision(op.x);
  check_optional(op.state, "state", full, {-1, s.d_conv - 1, s.d_inner});
  check_sequences(ctx, op.seq_start, op.slot, op.state, s.tokens);
  check_tensor(grad.dy, "dy", op.x.dtype, {s.tokens, s.d_inner});
  check_tensor(grad.dx, "dx", op.x.dtype, {s.tokens, s.d_inner});
  check_tensor(grad.dweight, "dweight", full, {s.d_inner, s.d_conv});
  check_optional(grad.dbias, "dbias", full, {s.d_inner});
  KRAIT_CHECK(!op.bias == !grad.dbias && grad.dweight.contiguous());
  check_optional(grad.dstate, "dstate", full, {-1, s.d_conv - 1, s.d_inner});
  KRAIT_CHECK(!grad.dstate || grad.dstate.contiguous());
  check_slots(ctx, op.slot, grad.dstate, op.seq_start.shape[0] - 1);
  if (s.tokens > 0) ctx.engine().causal_conv1d_bwd(ctx, op, grad);
}

void causal_conv1d_step(Context& ctx, const CausalConv1d& op) {
  const Shape s = check_inputs(op);
  KRAIT_CHECK(op.state && !op.seq_start);
  check_tensor(op.y, "y", op.x.dtype, {s.tokens, s.d_inner});
  check_slots(ctx, op.slot, op.state, s.tokens);
  if (s.tokens > 0) ctx.engine().causal_conv1d_step(ctx, op);
}

}  // namespace krait
