#include <algorithm>
#include <cmath>

#include "core/threads.h"
#include "ops/engine.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/rms_norm_cpu.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

// v as it is after being kept as an R.
template <class R>
HWY_INLINE VF kept_as(DF d, VF v) {
  if constexpr (std::is_same_v<R, float>) return v;
  HWY_ALIGN R lanes[kLanes];
  store_f32(d, v, lanes);
  return load_f32(d, lanes);
}

// One row of the stream r = residual + x_0 + x_1 .., at the time of reading.
template <class T, class R>
struct StreamRow {
  const R* residual;
  const T* x[kMaxAddends];
  int count = 0;

  explicit StreamRow(const R* kept) : residual(kept) {}
  StreamRow(const RmsNorm& op, int64_t t) : residual(op.residual_in.row<R>(t)), count(addends(op)) {
    for (int k = 0; k < count; ++k) x[k] = op.x[static_cast<size_t>(k)].template row<T>(t);
  }

  HWY_INLINE VF operator()(DF d, size_t i, size_t valid) const {
    VF r = load_part(d, residual + i, valid);
    for (int k = 0; k < count; ++k) r = kept_as<R>(d, hn::Add(r, load_part(d, x[k] + i, valid)));
    return r;
  }
};

// Two accumulators, even and odd vectors; always added up in the same order.
struct Sum {
  VF even, odd;

  HWY_INLINE void add_product(size_t i, VF a, VF b) {
    if (i / kLanes % 2 == 0)
      even = hn::MulAdd(a, b, even);
    else
      odd = hn::MulAdd(a, b, odd);
  }
  HWY_INLINE double total(DF d) const {
    return static_cast<double>(hn::GetLane(hn::SumOfLanes(d, hn::Add(even, odd))));
  }
};

template <class T, class R>
void norm_row(const RmsNorm& op, int64_t t) {
  const DF d;
  const auto width = static_cast<size_t>(op.y.shape[1]);
  StreamRow<T, R> r(op, t);
  R* out = op.residual_out ? op.residual_out.row<R>(t) : nullptr;
  const float* w = op.weight.ptr<float>();
  T* y = op.y.row<T>(t);

  Sum squares{hn::Zero(d), hn::Zero(d)};
  for_each_vector(width, [&](size_t i, size_t valid) HWY_ATTR {
    const VF v = r(d, i, valid);
    squares.add_product(i, v, v);
    if (out) store_part(d, v, out + i, valid);
  });
  const double mean = squares.total(d) / static_cast<double>(width);
  const auto rstd = static_cast<float>(1 / std::sqrt(mean + static_cast<double>(op.eps)));
  if (out) r = StreamRow<T, R>(out);  // residual_in may be gone: it can be the same memory
  for_each_vector(width, [&](size_t i, size_t valid) HWY_ATTR {
    const VF v = hn::Mul(r(d, i, valid), hn::Set(d, rstd));
    store_part(d, hn::Mul(v, load_part(d, w + i, valid)), y + i, valid);
  });
  if (op.rstd) op.rstd.ptr<float>()[t] = rstd;
}

int64_t rows_per_thread_at_least(int64_t width) {
  return 1 + (int64_t{1} << 14) / (width + 1);  // below that a thread costs more than it gives
}

void rms_norm_fwd(Context& ctx, const RmsNorm& op) {
  const int64_t grain = rows_per_thread_at_least(op.y.shape[1]);
  dispatch_f32_bf16(op.y.dtype, [&](auto t) HWY_ATTR {
    dispatch_f32_bf16(op.residual_in.dtype, [&](auto r) HWY_ATTR {
      parallel_ranges(ctx.threads(), op.y.shape[0], grain,
                      [&](int64_t begin, int64_t end) HWY_ATTR {
                        for (int64_t i = begin; i < end; ++i)
                          norm_row<typename decltype(t)::type, typename decltype(r)::type>(op, i);
                      });
    });
  });
}

// dresidual, dx and y of one row; adds the row's part of dweight to `dweight`.
template <class T, class R>
void norm_row_bwd(const RmsNorm& op, const RmsNormGrad& grad, int64_t t, float* dweight) {
  const DF d;
  const auto width = static_cast<size_t>(grad.dy.shape[1]);
  const StreamRow<T, R> r =
      op.residual_out ? StreamRow<T, R>(op.residual_out.row<R>(t)) : StreamRow<T, R>(op, t);
  const float* w = op.weight.ptr<float>();
  const float rstd = op.rstd.ptr<float>()[t];
  const T* dy = grad.dy.row<T>(t);
  R* dr = grad.dresidual.row<R>(t);
  T* dx = grad.dx ? grad.dx.row<T>(t) : nullptr;
  T* y = grad.y ? grad.y.row<T>(t) : nullptr;

  Sum dot{hn::Zero(d), hn::Zero(d)};
  for_each_vector(width, [&](size_t i, size_t valid) HWY_ATTR {
    const VF dyr = hn::Mul(load_part(d, dy + i, valid), r(d, i, valid));
    dot.add_product(i, dyr, load_part(d, w + i, valid));
    const VF sum = hn::MulAdd(dyr, hn::Set(d, rstd), load_part(d, dweight + i, valid));
    store_part(d, sum, dweight + i, valid);
  });
  const double cube = static_cast<double>(rstd) * rstd * rstd;
  const auto c = static_cast<float>(cube * dot.total(d) / static_cast<double>(width));
  for_each_vector(width, [&](size_t i, size_t valid) HWY_ATTR {
    const VF g = hn::Mul(load_part(d, dy + i, valid), load_part(d, w + i, valid));
    const VF r_i = r(d, i, valid), rc = hn::Mul(r_i, hn::Set(d, c));
    const VF norm_part = hn::MulSub(g, hn::Set(d, rstd), rc);
    const VF sum = hn::Add(load_part(d, dr + i, valid), norm_part);
    store_part(d, sum, dr + i, valid);
    if (dx) store_part(d, kept_as<R>(d, sum), dx + i, valid);
    if (y)
      store_part(d, hn::Mul(hn::Mul(r_i, hn::Set(d, rstd)), load_part(d, w + i, valid)), y + i,
                 valid);
  });
}

void rms_norm_bwd(Context& ctx, const RmsNorm& op, const RmsNormGrad& grad) {
  constexpr int64_t kRows = 64;  // rows whose parts of dweight are summed first, by one thread
  const int64_t tokens = grad.dy.shape[0], d_model = grad.dy.shape[1];
  const int64_t blocks = (tokens + kRows - 1) / kRows;
  const Arena::Scope scope(ctx.workspace());
  float* partial = ctx.workspace().array<float>(blocks * d_model);
  dispatch_f32_bf16(grad.dy.dtype, [&](auto t) HWY_ATTR {
    dispatch_f32_bf16(grad.dresidual.dtype, [&](auto r) HWY_ATTR {
      parallel_for(ctx.threads(), blocks, [&](int64_t block) HWY_ATTR {
        float* sum = partial + block * d_model;
        std::fill(sum, sum + d_model, 0.0f);
        for (int64_t i = block * kRows; i < std::min(tokens, (block + 1) * kRows); ++i)
          norm_row_bwd<typename decltype(t)::type, typename decltype(r)::type>(op, grad, i, sum);
      });
    });
  });
  float* dweight = grad.dweight.ptr<float>();
  for (int64_t i = 0; i < d_model; ++i) {
    float sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += partial[block * d_model + i];
    dweight[i] += sum;
  }
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait {
HWY_EXPORT(rms_norm_fwd);
HWY_EXPORT(rms_norm_bwd);
}  // namespace krait

namespace krait::cpu {

void rms_norm_fwd(Context& ctx, const RmsNorm& op) { HWY_DYNAMIC_DISPATCH(rms_norm_fwd)(ctx, op); }

void rms_norm_bwd(Context& ctx, const RmsNorm& op, const RmsNormGrad& grad) {
  HWY_DYNAMIC_DISPATCH(rms_norm_bwd)(ctx, op, grad);
}

}  // namespace krait::cpu
#endif
