// Strategy: a piece of kPieceRows weight rows is widened once for a block of tokens, multiplied
// with it into f32 sums, and the sums, still in the cache, become y.
#include "ops/linear_int8.h"

#include <algorithm>

#include "core/threads.h"
#include "ops/onednn.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/linear_int8.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

// to (rows, columns) T = from (rows, columns) i8.
void widen_int8(Context& ctx, const Tensor& from, const Tensor& to) {
  dispatch_f32_bf16(to.dtype, [&](auto t) HWY_ATTR {
    using T = typename decltype(t)::type;
    parallel_ranges(ctx.threads(), to.shape[0], 16, [&](int64_t begin, int64_t end) HWY_ATTR {
      const DF d;
      for (int64_t i = begin; i < end; ++i) {
        const int8_t* const in = from.row<int8_t>(i);
        T* const out = to.row<T>(i);
        for_each_vector(static_cast<size_t>(to.shape[1]), [&](size_t j, size_t valid) HWY_ATTR {
          store_part(d, load_part(d, in + j, valid), out + j, valid);
        });
      }
    });
  });
}

// y (tokens, columns) = scale (columns) sums (tokens, columns) + bias; sums may be y.
void scale_columns(Context& ctx, const Tensor& sums, const Linear& op) {
  dispatch_f32_bf16(op.y.dtype, [&](auto t) HWY_ATTR {
    using Y = typename decltype(t)::type;
    parallel_ranges(ctx.threads(), op.y.shape[0], 1, [&](int64_t begin, int64_t end) HWY_ATTR {
      const DF d;
      const float* const scale = op.weight_scale.ptr<float>();
      const float* const bias = op.bias ? op.bias.ptr<float>() : nullptr;
      for (int64_t i = begin; i < end; ++i) {
        const float* const from = sums.row<float>(i);
        Y* const to = op.y.row<Y>(i);
        for_each_vector(static_cast<size_t>(op.y.shape[1]), [&](size_t j, size_t valid) HWY_ATTR {
          VF y = hn::Mul(load_part(d, from + j, valid), load_part(d, scale + j, valid));
          if (bias) y = hn::Add(y, load_part(d, bias + j, valid));
          store_part(d, y, to + j, valid);
        });
      }
    });
  });
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait {
HWY_EXPORT(widen_int8);
HWY_EXPORT(scale_columns);
}  // namespace krait

namespace krait::cpu {
namespace {

// They bound the workspace. A piece is widened anew for every block of tokens.
constexpr int64_t kPieceRows = 512, kBlockTokens = 1024;

// One block of tokens by one piece of the matrix.
void piece(Context& ctx, const Linear& op) {
  Arena& arena = ctx.workspace();
  const Arena::Scope scope(arena);
  const Tensor weight = arena.tensor(op.x.dtype, {op.weight.shape[0], op.weight.shape[1]});
  const Tensor sums =
      op.y.dtype == DType::f32 ? op.y : arena.tensor(DType::f32, {op.y.shape[0], op.y.shape[1]});
  HWY_DYNAMIC_DISPATCH(widen_int8)(ctx, op.weight, weight);
  matmul(ctx, {.a = op.x, .b = transposed(weight), .bias = {}, .c = sums});
  HWY_DYNAMIC_DISPATCH(scale_columns)(ctx, sums, op);
}

}  // namespace

void linear_fwd_int8(Context& ctx, const Linear& op) {
  const int64_t tokens = op.x.shape[0], rows = op.weight.shape[0];
  for (int64_t t = 0; t < tokens; t += kBlockTokens)
    for (int64_t o = 0; o < rows; o += kPieceRows) {
      const int64_t t_end = std::min(tokens, t + kBlockTokens),
                    o_end = std::min(rows, o + kPieceRows);
      piece(ctx, {.x = op.x.slice(0, t, t_end),
                  .weight = op.weight.slice(0, o, o_end),
                  .bias = op.bias ? op.bias.slice(0, o, o_end) : Tensor(),
                  .y = op.y.slice(0, t, t_end).slice(1, o, o_end),
                  .weight_scale = op.weight_scale.slice(0, o, o_end)});
    }
}

}  // namespace krait::cpu
#endif
