// Strategy: the logits of a chunk of tokens at a time, in f32. A thread takes whole rows of them;
// the gradient takes its row's place, so that a chunk needs memory once.
#include <algorithm>
#include <cmath>

#include "core/threads.h"
#include "ops/engine.h"
#include "ops/onednn.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cross_entropy_cpu.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

float row_max(const float* logits, size_t count) {
  const DF d;
  VF max = hn::Set(d, logits[0]);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) max = hn::Max(max, load_f32(d, logits + i));
  float result = hn::GetLane(hn::MaxOfLanes(d, max));
  for (; i < count; ++i) result = std::max(result, logits[i]);
  return result;
}

// Replaces every logit by e^(logit - max) when `keep`; the sum of these, blocks of them in double.
template <bool keep>
double exponentials(float* logits, size_t count, float max) {
  constexpr size_t kBlock = 2048;
  const DF d;
  double total = 0;
  for (size_t begin = 0; begin < count; begin += kBlock) {
    VF sum = hn::Zero(d);
    float* block = logits + begin;
    for_each_vector(std::min(kBlock, count - begin), [&](size_t i, size_t valid) HWY_ATTR {
      const VF e = exp_clamped(d, hn::Sub(load_part(d, block + i, valid), hn::Set(d, max)));
      if (keep) store_part(d, e, block + i, valid);
      sum = hn::Add(sum, valid == kLanes ? e : hn::IfThenElseZero(hn::FirstN(d, valid), e));
    });
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum)));
  }
  return total;
}

// Writes the row of dlogits over the exponentials it is made from. A T is no wider than a float, so
// what is written never overtakes what is read.
template <class T>
void scale_row(float* exps, size_t count, float factor) {
  const DF d;
  T* to = reinterpret_cast<T*>(exps);
  for_each_vector(count, [&](size_t i, size_t valid) HWY_ATTR {
    store_part(d, hn::Mul(load_part(d, exps + i, valid), hn::Set(d, factor)), to + i, valid);
  });
}

// The loss of each row.
void cross_entropy_rows(Context& ctx, const CrossEntropy& op, const Tensor& logits) {
  parallel_for(ctx.threads(), logits.shape[0], [&](int64_t t) HWY_ATTR {
    const int32_t target = op.targets.ptr<int32_t>()[t];
    float& loss = op.loss.ptr<float>()[t];
    loss = 0;
    if (target < 0) return;
    float* row = logits.row<float>(t);
    const auto count = static_cast<size_t>(logits.shape[1]);
    const float max = row_max(row, count);
    const double sum = exponentials<false>(row, count, max);
    loss = static_cast<float>(std::log(sum) + (static_cast<double>(max) - row[target]));
  });
}

// The loss of each row; the row becomes dlogits in T.
template <class T>
void gradient_rows(Context& ctx, const CrossEntropy& op, float scale, const Tensor& logits) {
  parallel_for(ctx.threads(), logits.shape[0], [&](int64_t t) HWY_ATTR {
    const int32_t target = op.targets.ptr<int32_t>()[t];
    float& loss = op.loss.ptr<float>()[t];
    float* row = logits.row<float>(t);
    const auto count = static_cast<size_t>(logits.shape[1]);
    loss = 0;
    if (target < 0) return std::fill(row, row + count, 0.0f);
    const float max = row_max(row, count), logit = row[target];
    const double sum = exponentials<true>(row, count, max);
    loss = static_cast<float>(std::log(sum) + (static_cast<double>(max) - logit));
    const double p = static_cast<double>(row[target]) / sum;
    scale_row<T>(row, count, static_cast<float>(static_cast<double>(scale) / sum));
    reinterpret_cast<T*>(row)[target] = static_cast<T>((p - 1) * static_cast<double>(scale));
  });
}

void cross_entropy_gradient_rows(Context& ctx, const CrossEntropy& op, float scale,
                                 const Tensor& logits) {
  dispatch_f32_bf16(op.x.dtype, [&](auto t) HWY_ATTR {
    gradient_rows<typename decltype(t)::type>(ctx, op, scale, logits);
  });
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait {
HWY_EXPORT(cross_entropy_rows);
HWY_EXPORT(cross_entropy_gradient_rows);
}  // namespace krait

namespace krait::cpu {
namespace {

// Enough tokens that reading the weights (and, for their gradient, writing them) is worth it.
int64_t chunk_tokens(int64_t vocab_size) {
  constexpr int64_t kBytes = int64_t{32} << 20;
  return std::clamp<int64_t>(kBytes / (4 * vocab_size) / 16 * 16, 64, 1024);
}

// body(chunk of op, its first token, its logits) for all chunks in order.
template <class F>
void for_each_chunk(Context& ctx, const CrossEntropy& op, F&& body) {
  const int64_t tokens = op.x.shape[0], vocab_size = op.weight.shape[0];
  const int64_t step = chunk_tokens(vocab_size);
  for (int64_t begin = 0; begin < tokens; begin += step) {
    const int64_t end = std::min(tokens, begin + step);
    const Arena::Scope scope(ctx.workspace());
    const CrossEntropy chunk = {.x = op.x.slice(0, begin, end),
                                .weight = op.weight,
                                .targets = op.targets.slice(0, begin, end),
                                .loss = op.loss.slice(0, begin, end),
                                .weight_scale = op.weight_scale};
    const Tensor logits = ctx.workspace().tensor(DType::f32, {end - begin, vocab_size});
    cpu::linear_fwd(ctx, {.x = chunk.x,
                          .weight = op.weight,
                          .bias = {},
                          .y = logits,
                          .weight_scale = op.weight_scale});
    body(chunk, begin, logits);
  }
}

}  // namespace

void cross_entropy_fwd(Context& ctx, const CrossEntropy& op) {
  for_each_chunk(ctx, op, [&](const CrossEntropy& chunk, int64_t, const Tensor& logits) {
    HWY_DYNAMIC_DISPATCH(cross_entropy_rows)(ctx, chunk, logits);
  });
}

void cross_entropy_bwd(Context& ctx, const CrossEntropy& op, const CrossEntropyGrad& grad) {
  for_each_chunk(ctx, op, [&](const CrossEntropy& chunk, int64_t begin, const Tensor& logits) {
    HWY_DYNAMIC_DISPATCH(cross_entropy_gradient_rows)(ctx, chunk, grad.scale, logits);
    Tensor dlogits = logits;  // in T, each row at the start of the f32 row it replaces
    dlogits.dtype = op.x.dtype;
    dlogits.stride[0] *= static_cast<int64_t>(sizeof(float) / size_of(op.x.dtype));
    const Linear head = {.x = chunk.x, .weight = op.weight, .bias = {}, .y = {}};
    cpu::linear_bwd(ctx, head,
                    {.dy = dlogits,
                     .dx = {},
                     .dweight = grad.dweight,
                     .dbias = {},
                     .add_dweight = grad.add_dweight || begin > 0});
    const Tensor dx = grad.dx.slice(0, begin, begin + logits.shape[0]);  // may be chunk.x
    cpu::linear_bwd(ctx, head, {.dy = dlogits, .dx = dx, .dweight = {}, .dbias = {}});
  });
}

}  // namespace krait::cpu
#endif
