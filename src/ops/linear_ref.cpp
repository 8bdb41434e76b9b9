#include "ops/engine.h"

namespace krait::reference {
namespace {

// T: activations, W: weights, Y: T or f32, F: f32 (f64 in double throughout).
template <class T, class W, class Y, class F>
void fwd(const Linear& op) {
  for (int64_t t = 0; t < op.x.shape[0]; ++t)
    for (int64_t o = 0; o < op.weight.shape[0]; ++o) {
      const T* x = op.x.row<T>(t);
      const W* w = op.weight.row<W>(o);
      double sum = 0;
      for (int64_t i = 0; i < op.weight.shape[1]; ++i) sum += static_cast<double>(x[i]) * w[i];
      if (op.weight_scale) sum *= static_cast<double>(op.weight_scale.ptr<F>()[o]);
      if (op.bias) sum += static_cast<double>(op.bias.ptr<F>()[o]);
      op.y.row<Y>(t)[o] = static_cast<Y>(sum);
    }
}

template <class T, class F>
void bwd(const Linear& op, const LinearGrad& grad) {
  const int64_t tokens = grad.dy.shape[0], out_features = grad.dy.shape[1];
  const auto dy = [&](int64_t t, int64_t o) { return static_cast<double>(grad.dy.row<T>(t)[o]); };
  if (grad.dx)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < grad.dx.shape[1]; ++i) {
        double sum = grad.add_dx ? static_cast<double>(grad.dx.row<T>(t)[i]) : 0.0;
        for (int64_t o = 0; o < out_features; ++o) sum += dy(t, o) * op.weight.row<T>(o)[i];
        grad.dx.row<T>(t)[i] = static_cast<T>(sum);
      }
  if (grad.dweight)
    for (int64_t o = 0; o < out_features; ++o)
      for (int64_t i = 0; i < grad.dweight.shape[1]; ++i) {
        double sum = grad.add_dweight ? static_cast<double>(grad.dweight.row<F>(o)[i]) : 0.0;
        for (int64_t t = 0; t < tokens; ++t) sum += dy(t, o) * op.x.row<T>(t)[i];
        grad.dweight.row<F>(o)[i] = static_cast<F>(sum);
      }
  if (grad.dbias)
    for (int64_t o = 0; o < out_features; ++o) {
      double sum = grad.dbias.ptr<F>()[o];
      for (int64_t t = 0; t < tokens; ++t) sum += dy(t, o);
      grad.dbias.ptr<F>()[o] = static_cast<F>(sum);
    }
}

}  // namespace

void linear_fwd(Context&, const Linear& op) {
  const bool quantized = op.weight.dtype == DType::i8;
  if (op.x.dtype == DType::f64)
    return quantized ? fwd<double, int8_t, double, double>(op)
                     : fwd<double, double, double, double>(op);
  dispatch_f32_bf16(op.x.dtype, [&](auto t) {
    dispatch_f32_bf16(op.y.dtype, [&](auto y) {
      using T = typename decltype(t)::type;
      using Y = typename decltype(y)::type;
      quantized ? fwd<T, int8_t, Y, float>(op) : fwd<T, T, Y, float>(op);
    });
  });
}

void linear_bwd(Context&, const Linear& op, const LinearGrad& grad) {
  if (grad.dy.dtype == DType::f64) return bwd<double, double>(op, grad);
  dispatch_f32_bf16(grad.dy.dtype,
                    [&](auto t) { bwd<typename decltype(t)::type, float>(op, grad); });
}

}  // namespace krait::reference
