// Linear on the CPU: few rows by linear_matvec, many by oneDNN.
#include <algorithm>

#include "core/threads.h"
#include "ops/engine.h"
#include "ops/linear_int8.h"
#include "ops/linear_matvec.h"
#include "ops/onednn.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/linear_cpu.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

constexpr int64_t kBiasColumns = 64;  // a thread's share: cache lines of every row
constexpr int64_t kBiasRows = 64;     // summed by themselves first: shorter chains of additions

// Sum over one block of kBiasRows rows, then over the blocks, in order.
template <class T>
VF column_sum(const Tensor& dy, int64_t column, size_t valid) {
  const DF d;
  VF total = hn::Zero(d);
  for (int64_t begin = 0; begin < dy.shape[0]; begin += kBiasRows) {
    const int64_t end = std::min(dy.shape[0], begin + kBiasRows);
    VF sum = hn::Zero(d);
    for (int64_t t = begin; t < end; ++t)
      sum = hn::Add(sum, load_part(d, dy.row<T>(t) + column, valid));
    total = hn::Add(total, sum);
  }
  return total;
}

template <class T>
void dbias(Context& ctx, const Tensor& dy, const Tensor& out) {
  parallel_ranges(
      ctx.threads(), dy.shape[1], kBiasColumns, [&](int64_t begin, int64_t end) HWY_ATTR {
        const DF d;
        for_each_vector(static_cast<size_t>(end - begin), [&](size_t i, size_t valid) HWY_ATTR {
          const int64_t column = begin + static_cast<int64_t>(i);
          float* to = out.ptr<float>() + column;
          const VF sum = column_sum<T>(dy, column, valid);
          store_part(d, hn::Add(load_part(d, to, valid), sum), to, valid);
        });
      });
}

void linear_dbias(Context& ctx, const Tensor& dy, const Tensor& out) {
  dispatch_f32_bf16(dy.dtype,
                    [&](auto t) HWY_ATTR { dbias<typename decltype(t)::type>(ctx, dy, out); });
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait {
HWY_EXPORT(linear_dbias);
}

namespace krait::cpu {

namespace {

// Up to here linear_matvec is faster: it reads the weights at memory speed, and widens them in
// registers where oneDNN needs them widened in memory.
int64_t matvec_tokens(const Linear& op) {
  if (op.weight.dtype == DType::i8) return 16;
  return op.x.dtype == DType::bf16 && !native_bf16() ? 16 : 4;
}

constexpr int64_t kAddRows = 256;  // bounds the workspace of a sum that is rounded to bf16

void linear_dx(Context& ctx, const Linear& op, const LinearGrad& grad) {
  const Tensor& dx = grad.dx;
  if (!grad.add_dx || dx.dtype == DType::f32)
    return matmul(ctx,
                  {.a = grad.dy, .b = op.weight, .bias = {}, .c = dx, .accumulate = grad.add_dx});
  const Arena::Scope scope(ctx.workspace());
  const Tensor sum = ctx.workspace().tensor(DType::f32, {kAddRows, dx.shape[1]});
  for (int64_t begin = 0; begin < dx.shape[0]; begin += kAddRows) {
    const int64_t rows = std::min(kAddRows, dx.shape[0] - begin);
    matmul(ctx, {.a = grad.dy.slice(0, begin, begin + rows),
                 .b = op.weight,
                 .bias = {},
                 .c = sum.slice(0, 0, rows)});
    parallel_ranges(ctx.threads(), rows, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const float* from = sum.row<float>(i);
        bf16* to = dx.row<bf16>(begin + i);
        for (int64_t j = 0; j < dx.shape[1]; ++j) to[j] = bf16(static_cast<float>(to[j]) + from[j]);
      }
    });
  }
}

}  // namespace

void linear_fwd(Context& ctx, const Linear& op) {
  if (op.x.shape[0] == 0) return;
  if (ctx.batch_invariant || op.x.shape[0] <= matvec_tokens(op)) return linear_fwd_matvec(ctx, op);
  if (op.weight.dtype == DType::i8) return linear_fwd_int8(ctx, op);
  matmul(ctx, {.a = op.x, .b = transposed(op.weight), .bias = op.bias, .c = op.y});
}

void linear_bwd(Context& ctx, const Linear& op, const LinearGrad& grad) {
  if (grad.dy.shape[0] == 0) return;
  if (grad.dx) linear_dx(ctx, op, grad);
  if (grad.dweight)
    matmul(ctx, {.a = transposed(grad.dy),
                 .b = op.x,
                 .bias = {},
                 .c = grad.dweight,
                 .accumulate = grad.add_dweight});
  if (grad.dbias) HWY_DYNAMIC_DISPATCH(linear_dbias)(ctx, grad.dy, grad.dbias);
}

}  // namespace krait::cpu
#endif
