#include <algorithm>
#include <cmath>

#include "ops/engine.h"

namespace krait::reference {
namespace {

template <class F>
void update(const AdamW& op) {
  const double lr = op.lr, beta1 = op.beta1, beta2 = op.beta2, step = static_cast<double>(op.step);
  if (op.norm && !std::isfinite(*op.norm.ptr<F>())) return;
  double clip = 1;
  if (op.norm) clip = std::min(1.0, static_cast<double>(op.max_norm) / (*op.norm.ptr<F>() + 1e-6));
  for (int64_t i = 0; i < op.param.size(); ++i) {
    F &param = op.param.ptr<F>()[i], &m_i = op.m.ptr<F>()[i], &v_i = op.v.ptr<F>()[i];
    const double g = op.grad.ptr<F>()[i] * clip;
    const double m = beta1 * m_i + (1 - beta1) * g, v = beta2 * v_i + (1 - beta2) * g * g;
    const double m_hat = m / (1 - std::pow(beta1, step)), v_hat = v / (1 - std::pow(beta2, step));
    param = static_cast<F>(param - lr * static_cast<double>(op.weight_decay) * param -
                           lr * m_hat / (std::sqrt(v_hat) + static_cast<double>(op.eps)));
    if (op.rounded) op.rounded.ptr<bf16>()[i] = bf16(static_cast<float>(param));
    m_i = static_cast<F>(m);
    v_i = static_cast<F>(v);
  }
}

template <class F>
void norm_of(const GlobalNorm& op) {
  double sum = 0;
  for (const Tensor& grad : op.grads)
    for (int64_t i = 0; i < grad.size(); ++i)
      sum += static_cast<double>(grad.ptr<F>()[i]) * grad.ptr<F>()[i];
  *op.norm.ptr<F>() = static_cast<F>(std::sqrt(sum));
}

}  // namespace

void adamw(Context&, const AdamW& op) {
  op.param.dtype == DType::f64 ? update<double>(op) : update<float>(op);
}

void global_norm(Context&, const GlobalNorm& op) {
  op.norm.dtype == DType::f64 ? norm_of<double>(op) : norm_of<float>(op);
}

}  // namespace krait::reference
