// Linear on a GPU: one token by linear_matvec where it is faster, else by linear_skinny,
// linear_tiles or gemm (cuBLASLt), bias and its gradient by linear_kernels.cu. Weights in 8 bits:
// one token by linear_matvec, some by linear_int8_tiles, for many the weights are widened. With
// batch_invariant all by linear_tiles, or linear_matvec where that cannot.
#include <algorithm>

#include "ops/cuda/gemm.h"
#include "ops/linear_kernels.h"
#include "ops/linear_plan.h"

namespace krait::cuda {
namespace {

// Of f32 sums that still lack the bias; of those that lack a scale, since these are many: so few
// that they stay in the L2 cache, and still a tile for every multiprocessor.
constexpr int64_t kSumsBytes = int64_t{64} << 20, kScaledBytes = int64_t{16} << 20;
constexpr int64_t kWideBytes = int64_t{64} << 20;  // of weights in 8 bits that are widened at once
constexpr int64_t kRowTile = 128;                  // rows of a matrix product's tile

bool rounds_last(const Linear& op) {
  return (op.weight_scale || op.bias) && op.y.dtype == DType::bf16;
}

// Every row in the same order, whatever their number; sums that are scaled or added to before they
// are rounded; and where cuBLASLt is slower.
bool by_tiles(Context& ctx, const Linear& op) {
  return (ctx.batch_invariant || rounds_last(op) ||
          LinearTilesPlan::suits(op.x.shape[0], op.x.shape[1], op.weight.shape[0])) &&
         takes_tiles(state_of(ctx), op);
}

bool by_matvec(Context& ctx, const Linear& op) {
  return ctx.batch_invariant ||
         (op.x.shape[0] == 1 &&
          LinearMatvecPlan::one_wave(op.weight.shape[0], state_of(ctx).multiprocessors));
}

// A bf16 y is rounded once, after scale and bias: the sums pass through the workspace in f32, some
// rows at a time.
void fwd_rounding_last(Context& ctx, const Linear& op) {
  const int64_t tokens = op.x.shape[0], width = op.y.shape[1];
  const int64_t bytes = op.weight_scale ? kScaledBytes : kSumsBytes;
  const int64_t step = std::clamp<int64_t>(bytes / (4 * width), 64, tokens + 64);
  const Arena::Scope scope(ctx.workspace());
  const Tensor sums = ctx.workspace().tensor(DType::f32, {std::min(step, tokens), width});
  for (int64_t begin = 0; begin < tokens; begin += step) {
    const int64_t end = std::min(tokens, begin + step);
    const Tensor part = sums.slice(0, 0, end - begin);
    gemm(ctx, {.a = op.x.slice(0, begin, end), .b = transposed(op.weight), .c = part});
    launch_scale_and_bias(ctx, part, op.weight_scale, op.bias, op.y.slice(0, begin, end));
  }
}

// With weights in T.
void fwd_of_many(Context& ctx, const Linear& op) {
  if (by_tiles(ctx, op)) return launch_tiles(ctx, op);
  if (rounds_last(op)) return fwd_rounding_last(ctx, op);
  gemm(ctx, {.a = op.x, .b = transposed(op.weight), .c = op.y});
  if (op.weight_scale || op.bias) launch_scale_and_bias(ctx, op.y, op.weight_scale, op.bias, op.y);
}

// Weights in 8 bits are widened to T, where they are exact, a piece of the matrix at a time.
void fwd_widening(Context& ctx, const Linear& op) {
  const int64_t rows = op.weight.shape[0], in = op.weight.shape[1];
  const int64_t row_bytes = in * static_cast<int64_t>(size_of(op.x.dtype));
  const int64_t step = std::max<int64_t>(1, kWideBytes / row_bytes / kRowTile) * kRowTile;
  const Arena::Scope scope(ctx.workspace());
  const Tensor wide = ctx.workspace().tensor(op.x.dtype, {std::min(step, rows), in});
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t end = std::min(rows, begin + step);
    const Tensor part = wide.slice(0, 0, end - begin);
    launch_widen_int8(ctx, op.weight.slice(0, begin, end), part);
    fwd_of_many(ctx, {.x = op.x,
                      .weight = part,
                      .bias = op.bias ? op.bias.slice(0, begin, end) : Tensor(),
                      .y = op.y.slice(1, begin, end),
                      .weight_scale = op.weight_scale.slice(0, begin, end)});
  }
}

void fwd_int8(Context& ctx, const Linear& op) {
  const int64_t tokens = op.x.shape[0];
  if (ctx.batch_invariant && takes_tiles(state_of(ctx), op)) return fwd_widening(ctx, op);
  if (ctx.batch_invariant || tokens == 1) return launch_matvec_int8(ctx, op);
  if (takes_int8_tiles(op)) return launch_int8_tiles(ctx, op);
  if (tokens <= LinearInt8TilesPlan::kMatvecTokens) return launch_matvec_int8(ctx, op);
  fwd_widening(ctx, op);
}

}  // namespace

void linear_fwd(Context& ctx, const Linear& op) {
  if (op.x.shape[0] == 0 || op.weight.size() == 0) return;
  if (op.weight.dtype == DType::i8) return fwd_int8(ctx, op);
  if (ctx.batch_invariant && takes_tiles(state_of(ctx), op)) return launch_tiles(ctx, op);
  if (by_matvec(ctx, op)) return launch_matvec(ctx, op);
  if (skinny_takes(state_of(ctx), op)) return launch_skinny(ctx, op);
  fwd_of_many(ctx, op);
}

void linear_bwd(Context& ctx, const Linear& op, const LinearGrad& grad) {
  if (grad.dy.size() == 0) return;
  if (grad.dx) gemm(ctx, {.a = grad.dy, .b = op.weight, .c = grad.dx, .accumulate = grad.add_dx});
  if (grad.dweight)
    gemm(ctx,
         {.a = transposed(grad.dy), .b = op.x, .c = grad.dweight, .accumulate = grad.add_dweight});
  if (grad.dbias) launch_dbias(ctx, grad.dy, grad.dbias);
}

}  // namespace krait::cuda
