#include "ops/engine.h"

namespace krait::reference {
namespace {

template <class T, class Y>
void fwd(const Embedding& op) {
  const int32_t* token = op.tokens.ptr<int32_t>();
  for (int64_t t = 0; t < op.y.shape[0]; ++t)
    for (int64_t i = 0; i < op.y.shape[1]; ++i)
      op.y.row<Y>(t)[i] = static_cast<Y>(op.weight.row<T>(token[t])[i]);
}

// F: the type of the sum's result, f32 or (in double throughout) f64.
template <class Y, class F>
void bwd(const Embedding& op, const EmbeddingGrad& grad) {
  const int32_t* token = op.tokens.ptr<int32_t>();
  for (int64_t v = 0; v < grad.dweight.shape[0]; ++v)
    for (int64_t i = 0; i < grad.dweight.shape[1]; ++i) {
      F& dweight = grad.dweight.row<F>(v)[i];
      double sum = dweight;
      for (int64_t t = 0; t < op.tokens.shape[0]; ++t)
        if (token[t] == v) sum += grad.dy.row<Y>(t)[i];
      dweight = static_cast<F>(sum);
    }
}

}  // namespace

void embedding_fwd(Context&, const Embedding& op) {
  dispatch_float(op.weight.dtype, [&](auto t) {
    dispatch_float(op.y.dtype, [&](auto y) {
      fwd<typename decltype(t)::type, typename decltype(y)::type>(op);
    });
  });
}

void embedding_bwd(Context&, const Embedding& op, const EmbeddingGrad& grad) {
  if (grad.dy.dtype == DType::f64) return bwd<double, double>(op, grad);
  dispatch_f32_bf16(grad.dy.dtype,
                    [&](auto y) { bwd<typename decltype(y)::type, float>(op, grad); });
}

}  // namespace krait::reference
