#include "ops/cross_entropy.h"

#include "ops/check.h"
#include "ops/elementwise.h"
#include "ops/engine.h"
#include "ops/linear.h"

namespace krait {
namespace {

// Targets are looked at where the host can read them; on a GPU one beyond the vocabulary gives a
// loss that is not a number.
void check(Context& ctx, const CrossEntropy& op) {
  check_tensor(op.x, "x", op.x.dtype, {-1, -1});
  const int64_t tokens = op.x.shape[0];
  check_weight(op.weight, op.weight_scale, op.x);
  KRAIT_CHECK(op.weight.shape[0] >= 1, "weight must have at least one row");
  check_tensor(op.loss, "loss", full_precision(op.x), {tokens});
  check_tensor(op.targets, "targets", DType::i32, {tokens});
  if (!ctx.memory().on_host()) return;
  const int32_t* target = op.targets.ptr<int32_t>();
  for (int64_t t = 0; t < tokens; ++t)
    KRAIT_CHECK(target[t] < op.weight.shape[0],
                "target " + std::to_string(target[t]) + " at " + std::to_string(t));
}

}  // namespace

Cost cross_entropy_cost(const CrossEntropy& op) {
  const double tokens = static_cast<double>(op.x.shape[0]);
  return {.flops = 2 * tokens * static_cast<double>(op.weight.size()),
          .bytes = static_cast<double>(op.x.bytes() + op.weight.bytes() + op.targets.bytes() +
                                       op.loss.bytes() + op.weight_scale.bytes()),
          .exps = tokens * static_cast<double>(op.weight.shape[0])};
}

void cross_entropy_fwd(Context& ctx, const CrossEntropy& op) {
  check(ctx, op);
  ctx.engine().cross_entropy_fwd(ctx, op);
}

void cross_entropy_bwd(Context& ctx, const CrossEntropy& op, const CrossEntropyGrad& grad) {
  check(ctx, op);
  KRAIT_CHECK(op.weight.dtype != DType::i8, "weights in 8 bits have no gradient");
  check_tensor(grad.dx, "dx", op.x.dtype, {op.x.shape[0], op.x.shape[1]});
  check_optional(grad.dweight, "dweight", full_precision(op.x),
                 {op.weight.shape[0], op.weight.shape[1]});
  KRAIT_CHECK(!grad.dweight || grad.dweight.contiguous(), "dweight must be contiguous");
  if (op.x.shape[0] == 0 && grad.dweight && !grad.add_dweight) return fill_zero(ctx, grad.dweight);
  ctx.engine().cross_entropy_bwd(ctx, op, grad);
}

}  // namespace krait
