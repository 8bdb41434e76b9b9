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

// r of a token: every sum rounded to R, as it would be kept.
template <class T, class R>
std::vector<R> stream(const RmsNorm& op, int64_t t) {
  const Tensor& residual = op.residual_in;
  std::vector<R> row(residual.row<R>(t), residual.row<R>(t) + residual.shape[1]);
  for (int k = 0; k < addends(op); ++k) {
    const T* x = op.x[static_cast<size_t>(k)].template row<T>(t);
    for (size_t i = 0; i < row.size(); ++i)
      row[i] = static_cast<R>(static_cast<double>(row[i]) + static_cast<double>(x[i]));
  }
  return row;
}

// T: activations, R: the residual stream, F: weights (f32, or f64 in double throughout).
template <class T, class R, class F>
void fwd(const RmsNorm& op) {
  const int64_t d_model = op.y.shape[1];
  for (int64_t t = 0; t < op.y.shape[0]; ++t) {
    const std::vector<R> row = stream<T, R>(op, t);
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
  const int64_t d_model = grad.dy.shape[1];
  const F *w = op.weight.ptr<F>(), *before = grad.dweight.ptr<F>();
  RmsNorm kept = op;
  if (op.residual_out) kept.residual_in = op.residual_out, kept.x = {};
  std::vector<double> dweight(before, before + d_model);
  for (int64_t t = 0; t < grad.dy.shape[0]; ++t) {
    // Copies: y may stand where dy does, dx where an x does.
    const std::vector<T> dy_row(grad.dy.row<T>(t), grad.dy.row<T>(t) + d_model);
    const std::vector<R> r_row = stream<T, R>(kept, t);
    const T* dy = dy_row.data();
    const R* r = r_row.data();
    R* dresidual = grad.dresidual.row<R>(t);
    const double rstd = op.rstd.ptr<F>()[t];
    double dot = 0;
    for (int64_t i = 0; i < d_model; ++i) {
      dot += static_cast<double>(w[i]) * dy[i] * r[i];
      dweight[static_cast<size_t>(i)] += static_cast<double>(dy[i]) * r[i] * rstd;
    }
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
  for (int64_t i = 0; i < d_model; ++i)
    grad.dweight.ptr<F>()[i] = static_cast<F>(dweight[static_cast<size_t>(i)]);
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
    dispatch_f32_bf16(grad.dresidual.dtype, [&](auto r) {
      bwd<typename decltype(t)::type, typename decltype(r)::type, float>(op, grad);
    });
  });
}

}  // namespace krait::reference
