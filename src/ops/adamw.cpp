#include "ops/adamw.h"

#include "ops/check.h"
#include "ops/engine.h"

namespace krait {

Cost adamw_cost(const AdamW& op) {
  return {.flops = 15.0 * static_cast<double>(op.param.size()),
          .bytes = 7.0 * static_cast<double>(op.param.bytes()) +  // 4 read, 3 written
                   static_cast<double>(op.rounded.bytes())};
}

void adamw(Context& ctx, const AdamW& op) {
  const DType dtype = full_precision(op.param);
  for (const Tensor* t : {&op.param, &op.grad, &op.m, &op.v})
    KRAIT_CHECK(t->contiguous() && t->dtype == dtype && t->size() == op.param.size(),
                shape_string(*t) + " beside param " + shape_string(op.param));
  if (op.rounded)
    KRAIT_CHECK(op.rounded.contiguous() && op.rounded.dtype == DType::bf16 &&
                    op.rounded.size() == op.param.size(),
                shape_string(op.rounded) + " beside param " + shape_string(op.param));
  check_optional(op.norm, "norm", dtype, {1});
  KRAIT_CHECK(op.step >= 1);
  ctx.engine().adamw(ctx, op);
}

void global_norm(Context& ctx, const GlobalNorm& op) {
  check_tensor(op.norm, "norm", full_precision(op.norm), {1});
  for (const Tensor& grad : op.grads)
    KRAIT_CHECK(grad.contiguous() && grad.dtype == op.norm.dtype, "gradient " + shape_string(grad));
  ctx.engine().global_norm(ctx, op);
}

}  // namespace krait
