#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/engine.h"
#include "ops/ref_math.h"

namespace krait::reference {
namespace {

// T: activations, W: weights.
template <class T, class W>
std::vector<double> logits_of(const CrossEntropy& op, int64_t t) {
  std::vector<double> logits(static_cast<size_t>(op.weight.shape[0]));
  for (size_t v = 0; v < logits.size(); ++v) {
    for (int64_t i = 0; i < op.weight.shape[1]; ++i)
      logits[v] +=
          static_cast<double>(op.x.row<T>(t)[i]) * op.weight.row<W>(static_cast<int64_t>(v))[i];
    if (op.weight_scale) logits[v] *= static_cast<double>(op.weight_scale.ptr<Full<T>>()[v]);
  }
  return logits;
}

double log_sum_exp(const std::vector<double>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double logit : logits) sum += std::exp(logit - max);
  return max + std::log(sum);
}

template <class T, class W, class F>
void fwd(const CrossEntropy& op) {
  for (int64_t t = 0; t < op.x.shape[0]; ++t) {
    const int32_t target = op.targets.ptr<int32_t>()[t];
    F& loss = op.loss.ptr<F>()[t];
    loss = 0;
    if (target < 0) continue;
    const std::vector<double> logits = logits_of<T, W>(op, t);
    loss = static_cast<F>(log_sum_exp(logits) - logits[static_cast<size_t>(target)]);
  }
}

// dlogit_v = scale (exp(logit_v - log_sum_exp) - [v = target])
template <class T, class F>
void bwd(const CrossEntropy& op, const CrossEntropyGrad& grad) {
  const int64_t tokens = op.x.shape[0], d_model = op.x.shape[1];
  const auto vocab_size = static_cast<size_t>(op.weight.shape[0]);
  std::vector<double> dweight;
  if (grad.dweight) {
    const F* before = grad.dweight.ptr<F>();
    dweight.resize(static_cast<size_t>(grad.dweight.size()));
    if (grad.add_dweight) std::copy_n(before, dweight.size(), dweight.begin());
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t target = op.targets.ptr<int32_t>()[t];
    std::vector<double> dlogits(vocab_size), dx(static_cast<size_t>(d_model));
    if (target >= 0) {
      dlogits = logits_of<T, T>(op, t);
      const double norm = log_sum_exp(dlogits);
      for (double& d : dlogits) d = std::exp(d - norm) * static_cast<double>(grad.scale);
      dlogits[static_cast<size_t>(target)] -= static_cast<double>(grad.scale);
    }
    for (size_t v = 0; v < vocab_size; ++v)
      for (int64_t i = 0; i < d_model; ++i) {
        dx[static_cast<size_t>(i)] += dlogits[v] * op.weight.row<T>(static_cast<int64_t>(v))[i];
        if (grad.dweight)
          dweight[v * static_cast<size_t>(d_model) + static_cast<size_t>(i)] +=
              dlogits[v] * op.x.row<T>(t)[i];
      }
    for (int64_t i = 0; i < d_model; ++i)
      grad.dx.row<T>(t)[i] = static_cast<T>(dx[static_cast<size_t>(i)]);
  }
  for (size_t i = 0; i < dweight.size(); ++i) grad.dweight.ptr<F>()[i] = static_cast<F>(dweight[i]);
}

}  // namespace

void cross_entropy_fwd(Context&, const CrossEntropy& op) {
  const bool quantized = op.weight.dtype == DType::i8;
  dispatch_float(op.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    quantized ? fwd<T, int8_t, Full<T>>(op) : fwd<T, T, Full<T>>(op);
  });
}

void cross_entropy_bwd(Context& ctx, const CrossEntropy& op, const CrossEntropyGrad& grad) {
  reference::cross_entropy_fwd(ctx, op);
  if (op.x.dtype == DType::f64) return bwd<double, double>(op, grad);
  dispatch_f32_bf16(op.x.dtype, [&](auto t) { bwd<typename decltype(t)::type, float>(op, grad); });
}

}  // namespace krait::reference
