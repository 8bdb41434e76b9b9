#include "core/threads.h"
#include "ops/engine.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/embedding_cpu.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

template <class T, class Y>
void embedding_rows(const Embedding& op, int64_t begin, int64_t end) {
  const DF d;
  const int32_t* token = op.tokens.ptr<int32_t>();
  for (int64_t t = begin; t < end; ++t) {
    const T* from = op.weight.row<T>(token[t]);
    Y* to = op.y.row<Y>(t);
    for_each_vector(static_cast<size_t>(op.y.shape[1]), [&](size_t i, size_t valid) HWY_ATTR {
      store_part(d, load_part(d, from + i, valid), to + i, valid);
    });
  }
}

void embedding_fwd(Context& ctx, const Embedding& op) {
  const int64_t grain = 1 + (int64_t{1} << 14) / (op.y.shape[1] + 1);
  dispatch_f32_bf16(op.weight.dtype, [&](auto t) HWY_ATTR {
    dispatch_f32_bf16(op.y.dtype, [&](auto y) HWY_ATTR {
      parallel_ranges(ctx.threads(), op.y.shape[0], grain, [&](int64_t b, int64_t e) HWY_ATTR {
        embedding_rows<typename decltype(t)::type, typename decltype(y)::type>(op, b, e);
      });
    });
  });
}

// Columns are split over threads, so each element sums its tokens in their order.
template <class Y>
void embedding_columns(const Embedding& op, const EmbeddingGrad& grad, int64_t begin, int64_t end) {
  const DF d;
  const int32_t* token = op.tokens.ptr<int32_t>();
  for (int64_t t = 0; t < op.tokens.shape[0]; ++t) {
    const Y* dy = grad.dy.row<Y>(t) + begin;
    float* to = grad.dweight.row<float>(token[t]) + begin;
    for_each_vector(static_cast<size_t>(end - begin), [&](size_t i, size_t valid) HWY_ATTR {
      const VF sum = hn::Add(load_part(d, to + i, valid), load_part(d, dy + i, valid));
      store_part(d, sum, to + i, valid);
    });
  }
}

void embedding_bwd(Context& ctx, const Embedding& op, const EmbeddingGrad& grad) {
  constexpr int64_t kColumns = 64;
  dispatch_f32_bf16(grad.dy.dtype, [&](auto y) HWY_ATTR {
    parallel_ranges(ctx.threads(), grad.dy.shape[1], kColumns, [&](int64_t b, int64_t e) HWY_ATTR {
      embedding_columns<typename decltype(y)::type>(op, grad, b, e);
    });
  });
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait {
HWY_EXPORT(embedding_fwd);
HWY_EXPORT(embedding_bwd);
}  // namespace krait

namespace krait::cpu {

void embedding_fwd(Context& ctx, const Embedding& op) {
  HWY_DYNAMIC_DISPATCH(embedding_fwd)(ctx, op);
}

void embedding_bwd(Context& ctx, const Embedding& op, const EmbeddingGrad& grad) {
  HWY_DYNAMIC_DISPATCH(embedding_bwd)(ctx, op, grad);
}

}  // namespace krait::cpu
#endif
