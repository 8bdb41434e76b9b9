#include <cmath>
#include <vector>

#include "ops/engine.h"

namespace krait::reference {
namespace {

template <class R>
double rstd_of(const R* r, int64_t d_model, float eps) {
  double sum = 0;
  for (int64_t i = 0; i < d_model; ++i) sum += static_cast<double>(r[i]) * r[i];
  return 1 / std::sqrt(sum / static_cast<double>(d_model) + eps);
}

// T: activations, R: the residual stream, F: weights (f32, or f64 in double throughout).
template <class T, class R, class F>
void fwd(const RmsNorm& op) {
  const int64_t d_model = op.y.shape[1];
  for (int64_t t = 0; t < op.y.shape[0]; ++t) {
    // r is the stream as it is kept: rounded to R.
    const auto r = [&](int64_t i) {
      const double x = op.x ? static_cast<double>(op.x.row<T>(t)[i]) : 0.0;
      return static_cast<R>(static_cast<double>(op.residual_in.row<R>(t)[i]) + x);
    };
    std::vector<R> row(static_cast<size_t>(d_model));
    for (int64_t i = 0; i < d_model; ++i) row[static_cast<size_t>(i)] = r(i);
    const double rstd = rstd_of(row.data(), d_model, op.eps);
    for (int64_t i = 0; i < d_model; ++i) {
      const R ri = row[static_cast<size_t>(i)];
      op.y.row<T>(t)[i] = static_cast<T>(ri * rstd * op.weight.ptr<F>()[i]);
      if (op.residual_out) op.residual_out.row<R>(t)[i] = ri;  // may be where residual_in was
    }
    if (op.rstd) op.rstd.ptr<F>()[t] = static_cast<F>(rstd);
  }
}

// dr_i = rstd w_i dy_i - r_i rstd^3 / d_model sum_j w_j dy_j r_j
template <class T, class R, class F>
void bwd(const RmsNorm& op, const RmsNormGrad& grad) {
  const int64_t tokens = grad.dy.shape[0], d_model = grad.dy.shape[1];
  const F* w = op.weight.ptr<F>();
  for (int64_t t = 0; t < tokens; ++t) {
    const T* dy = grad.dy.row<T>(t);
    const R* r = op.residual_out.row<R>(t);
    R* dresidual = grad.dresidual.row<R>(t);
    const double rstd = op.rstd.ptr<F>()[t];
    double dot = 0;
    for (int64_t i = 0; i < d_model; ++i) dot += static_cast<double>(w[i]) * dy[i] * r[i];
    for (int64_t i = 0; i < d_model; ++i) {
      const double dr =
          rstd * w[i] * dy[i] - r[i] * rstd * rstd * rstd * dot / static_cast<double>(d_model);
      dresidual[i] = static_cast<R>(static_cast<double>(dresidual[i]) + dr);
      if (grad.dx) grad.dx.row<T>(t)[i] = static_cast<T>(dresidual[i]);
    }
    if (grad.y) {
      const double exact = rstd_of(r, d_model, op.eps);  // op.rstd is rounded
      for (int64_t i = 0; i < d_model; ++i)
        grad.y.row<T>(t)[i] = static_cast<T>(r[i] * exact * w[i]);
    }
  }
  for (int64_t i = 0; i < d_model; ++i) {
    double sum = grad.dweight.ptr<F>()[i];
    for (int64_t t = 0; t < tokens; ++t)
      sum += static_cast<double>(grad.dy.row<T>(t)[i]) * op.residual_out.row<R>(t)[i] *
             op.rstd.ptr<F>()[t];
    grad.dweight.ptr<F>()[i] = static_cast<F>(sum);
  }
}

}  // namespace

void rms_norm_fwd(Context&, const RmsNorm& op) {
  if (op.y.dtype == DType::f64) return fwd<double, double, double>(op);
  dispatch_f32_bf16(op.y.dtype, [&](auto t) {
    dispatch_f32_bf16(op.residual_in.dtype, [&](auto r) {
      fwd<typename decltype(t)::type, typename decltype(r)::type, float>(op);
    });
  });
}

void rms_norm_bwd(Context&, const RmsNorm& op, const RmsNormGrad& grad) {
  if (grad.dy.dtype == DType::f64) return bwd<double, double, double>(op, grad);
  dispatch_f32_bf16(grad.dy.dtype, [&](auto t) {
    dispatch_f32_bf16(op.residual_out.dtype, [&](auto r) {
      bwd<typename decltype(t)::type, typename decltype(r)::type, float>(op, grad);
    });
  });
}

}  // namespace krait::reference
