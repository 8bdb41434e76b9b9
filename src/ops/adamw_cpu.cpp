#include <algorithm>
#include <cmath>

#include "core/threads.h"
#include "ops/engine.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/adamw_cpu.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

// What is the same for every element, worked out in double.
struct Factors {
  float clip, beta1, beta2, one_minus_beta1, one_minus_beta2;
  float decay;    // lr weight_decay
  float rate;     // lr / (1 - beta1^step)
  float v_scale;  // 1 / (1 - beta2^step)
  float eps;
};

void adamw_range(const AdamW& op, const Factors& f, int64_t begin, int64_t end) {
  const DF d;
  float *param = op.param.ptr<float>() + begin, *m = op.m.ptr<float>() + begin,
        *v = op.v.ptr<float>() + begin;
  const float* grad = op.grad.ptr<float>() + begin;
  bf16* const rounded = op.rounded ? op.rounded.ptr<bf16>() + begin : nullptr;
  for_each_vector(static_cast<size_t>(end - begin), [&](size_t i, size_t valid) HWY_ATTR {
    const VF g = hn::Mul(load_part(d, grad + i, valid), hn::Set(d, f.clip));
    const VF m_new = hn::MulAdd(load_part(d, m + i, valid), hn::Set(d, f.beta1),
                                hn::Mul(g, hn::Set(d, f.one_minus_beta1)));
    const VF v_new = hn::MulAdd(load_part(d, v + i, valid), hn::Set(d, f.beta2),
                                hn::Mul(hn::Mul(g, hn::Set(d, f.one_minus_beta2)), g));
    const VF root = hn::Sqrt(hn::Mul(v_new, hn::Set(d, f.v_scale)));
    const VF step = hn::Div(hn::Mul(m_new, hn::Set(d, f.rate)), hn::Add(root, hn::Set(d, f.eps)));
    const VF p = load_part(d, param + i, valid);
    const VF change = hn::MulAdd(p, hn::Set(d, f.decay), step);
    const VF p_new = hn::Sub(p, change);
    store_part(d, p_new, param + i, valid);
    if (rounded) store_part(d, p_new, rounded + i, valid);
    store_part(d, m_new, m + i, valid);
    store_part(d, v_new, v + i, valid);
  });
}

void adamw(Context& ctx, const AdamW& op) {
  const double beta1 = op.beta1, beta2 = op.beta2, step = static_cast<double>(op.step);
  if (op.norm && !std::isfinite(*op.norm.ptr<float>())) return;
  double clip = 1;
  if (op.norm)
    clip = std::min(1.0, static_cast<double>(op.max_norm) / (*op.norm.ptr<float>() + 1e-6));
  const Factors f = {
      .clip = static_cast<float>(clip),
      .beta1 = op.beta1,
      .beta2 = op.beta2,
      .one_minus_beta1 = static_cast<float>(1 - beta1),
      .one_minus_beta2 = static_cast<float>(1 - beta2),
      .decay =
          static_cast<float>(static_cast<double>(op.lr) * static_cast<double>(op.weight_decay)),
      .rate = static_cast<float>(static_cast<double>(op.lr) / (1 - std::pow(beta1, step))),
      .v_scale = static_cast<float>(1 / (1 - std::pow(beta2, step))),
      .eps = op.eps};
  constexpr int64_t kGrain = int64_t{1} << 14;
  parallel_ranges(ctx.threads(), op.param.size(), kGrain,
                  [&](int64_t begin, int64_t end) HWY_ATTR { adamw_range(op, f, begin, end); });
}

// Squares and their sum in double.
double sum_of_squares(const float* x, int64_t count) {
  const hn::ScalableTag<double> d;
  const hn::Rebind<float, decltype(d)> d_float;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto a = hn::Zero(d), b = a;
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    const auto p = hn::PromoteTo(d, hn::LoadU(d_float, x + i));
    const auto q = hn::PromoteTo(d, hn::LoadU(d_float, x + i + lanes));
    a = hn::MulAdd(p, p, a);
    b = hn::MulAdd(q, q, b);
  }
  double sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(a, b)));
  for (; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

void global_norm(Context& ctx, const GlobalNorm& op) {
  constexpr int64_t kBlock = int64_t{1} << 14;  // summed by one thread, whatever their number
  double sum = 0;
  for (const Tensor& grad : op.grads) {
    const int64_t blocks = (grad.size() + kBlock - 1) / kBlock;
    const Arena::Scope scope(ctx.workspace());
    double* partial = ctx.workspace().array<double>(blocks);
    const float* x = grad.ptr<float>();
    parallel_for(ctx.threads(), blocks, [&](int64_t i) HWY_ATTR {
      partial[i] = sum_of_squares(x + i * kBlock, std::min(kBlock, grad.size() - i * kBlock));
    });
    for (int64_t i = 0; i < blocks; ++i) sum += partial[i];
  }
  *op.norm.ptr<float>() = static_cast<float>(std::sqrt(sum));
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait {
HWY_EXPORT(adamw);
HWY_EXPORT(global_norm);
}  // namespace krait

namespace krait::cpu {

void adamw(Context& ctx, const AdamW& op) { HWY_DYNAMIC_DISPATCH(adamw)(ctx, op); }

void global_norm(Context& ctx, const GlobalNorm& op) { HWY_DYNAMIC_DISPATCH(global_norm)(ctx, op); }

}  // namespace krait::cpu
#endif
