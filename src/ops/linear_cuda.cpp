// Linear on a GPU: one token by linear_matvec where it is faster, else by gemm (cuBLASLt), bias and
// its gradient by linear_kernels.cu.
#include <algorithm>

#include "ops/cuda/gemm.h"
#include "ops/linear_kernels.h"
#include "ops/linear_plan.h"

namespace krait::cuda {
namespace {

constexpr int64_t kBiasBytes = int64_t{64} << 20;  // of f32 sums that still lack the bias

bool by_matvec(Context& ctx, const Linear& op) {
  if (ctx.batch_invariant) return true;
  return op.x.shape[0] == 1 &&
         LinearMatvecPlan::one_wave(op.weight.shape[0], state_of(ctx).multiprocessors);
}

// A bf16 y is rounded once, after the bias: the sums pass through the workspace in f32, some rows
// at a time.
void fwd_rounding_after_bias(Context& ctx, const Linear& op) {
  const int64_t tokens = op.x.shape[0], width = op.y.shape[1];
  const int64_t step = std::clamp<int64_t>(kBiasBytes / (4 * width), 64, tokens + 64);
  const Arena::Scope scope(ctx.workspace());
  const Tensor sums = ctx.workspace().tensor(DType::f32, {std::min(step, tokens), width});
  for (int64_t begin = 0; begin < tokens; begin += step) {
    const int64_t end = std::min(tokens, begin + step);
    const Tensor part = sums.slice(0, 0, end - begin);
    gemm(ctx, {.a = op.x.slice(0, begin, end), .b = transposed(op.weight), .c = part});
    launch_add_bias(ctx, part, op.bias, op.y.slice(0, begin, end));
  }
}

}  // namespace

void linear_fwd(Context& ctx, const Linear& op) {
  if (op.x.shape[0] == 0 || op.weight.size() == 0) return;
  if (by_matvec(ctx, op)) return launch_matvec(ctx, op);
  if (op.bias && op.y.dtype == DType::bf16) return fwd_rounding_after_bias(ctx, op);
  gemm(ctx, {.a = op.x, .b = transposed(op.weight), .c = op.y});
  if (op.bias) launch_add_bias(ctx, op.y, op.bias, op.y);
}

void linear_bwd(Context& ctx, const Linear& op, const LinearGrad& grad) {
  if (grad.dy.size() == 0) return;
  if (grad.dx) gemm(ctx, {.a = grad.dy, .b = op.weight, .c = grad.dx, .accumulate = grad.add_dx});
  if (grad.dweight)
    gemm(ctx, {.a = transposed(grad.dy), .b = op.x, .c = grad.dweight, .accumulate = true});
  if (grad.dbias) launch_dbias(ctx, grad.dy, grad.dbias);
}

}  // namespace krait::cuda
