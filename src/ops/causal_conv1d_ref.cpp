// The specification of the causal convolution: one channel of one sequence at a time, in double.
#include <cmath>
#include <vector>

#include "ops/engine.h"
#include "ops/ref_math.h"

namespace krait::reference {
namespace {

template <class S>
S* state_of(const Tensor& state, const Tensor& slot, int64_t sequence) {
  if (!state) return nullptr;
  return state.row<S>(slot ? slot.ptr<int32_t>()[sequence] : sequence);
}

// One channel of one sequence, with the d_conv - 1 inputs before it in front: x[i] is the input of
// token begin + i - (d_conv - 1).
template <class T, class S>
std::vector<double> padded_inputs(const CausalConv1d& op, int64_t s, int64_t c) {
  const int64_t begin = op.seq_start.ptr<int32_t>()[s], end = op.seq_start.ptr<int32_t>()[s + 1];
  const int64_t before = op.weight.shape[1] - 1;
  const S* state = state_of<S>(op.state, op.slot, s);
  std::vector<double> x;
  for (int64_t i = 0; i < before; ++i)
    x.push_back(state ? static_cast<double>(state[i * op.x.shape[1] + c]) : 0);
  for (int64_t t = begin; t < end; ++t) x.push_back(op.x.row<T>(t)[c]);
  return x;
}

// bias + sum_k weight[k] x[i + k]
template <class P>
double convolve(const CausalConv1d& op, int64_t c, const std::vector<double>& x, size_t i) {
  double s = op.bias ? op.bias.ptr<P>()[c] : 0;
  for (int64_t k = 0; k < op.weight.shape[1]; ++k)
    s += op.weight.row<P>(c)[k] * x[i + static_cast<size_t>(k)];
  return s;
}

// T: element type of activations; P: of parameters (f32, or f64 when T is); S: of states.
template <class T, class P, class S>
void forward(const CausalConv1d& op) {
  const int32_t* start = op.seq_start.ptr<int32_t>();
  const size_t before = static_cast<size_t>(op.weight.shape[1] - 1);
  for (int64_t s = 0; s < op.seq_start.shape[0] - 1; ++s)
    for (int64_t c = 0; c < op.x.shape[1]; ++c) {
      const std::vector<double> x = padded_inputs<T, S>(op, s, c);
      for (size_t i = 0; i + before < x.size(); ++i) {
        double y = convolve<P>(op, c, x, i);
        if (op.silu) y *= sigmoid(y);
        op.y.row<T>(start[s] + static_cast<int64_t>(i))[c] = static_cast<T>(y);
      }
      if (S* state = state_of<S>(op.state, op.slot, s))
        for (size_t i = 0; i < before; ++i)
          state[static_cast<int64_t>(i) * op.x.shape[1] + c] =
              static_cast<S>(x[x.size() - before + i]);
    }
}

template <class T, class P>
void backward(const CausalConv1d& op, const CausalConv1dGrad& grad) {
  const int32_t* start = op.seq_start.ptr<int32_t>();
  const int64_t d_inner = op.x.shape[1], d_conv = op.weight.shape[1];
  const size_t before = static_cast<size_t>(d_conv - 1);
  for (int64_t c = 0; c < d_inner; ++c) {
    std::vector<double> dweight(static_cast<size_t>(d_conv));
    double dbias = 0;
    for (int64_t s = 0; s < op.seq_start.shape[0] - 1; ++s) {
      const std::vector<double> x = padded_inputs<T, P>(op, s, c);
      std::vector<double> dx(x.size());
      P* dstate = state_of<P>(grad.dstate, op.slot, s);
      for (size_t i = 0; i < before && dstate; ++i)
        dx[x.size() - before + i] = dstate[static_cast<int64_t>(i) * d_inner + c];
      for (size_t i = 0; i + before < x.size(); ++i) {
        double ds = grad.dy.row<T>(start[s] + static_cast<int64_t>(i))[c];
        if (op.silu) {
          const double v = convolve<P>(op, c, x, i), sig = sigmoid(v);
          ds *= sig * (1 + v * (1 - sig));
        }
        dbias += ds;
        for (size_t k = 0; k < dweight.size(); ++k) {
          dweight[k] += ds * x[i + k];
          dx[i + k] += ds * op.weight.row<P>(c)[k];
        }
      }
      for (size_t i = 0; i + before < x.size(); ++i)
        grad.dx.row<T>(start[s] + static_cast<int64_t>(i))[c] = static_cast<T>(dx[i + before]);
      for (size_t i = 0; i < before && dstate; ++i)
        dstate[static_cast<int64_t>(i) * d_inner + c] = static_cast<P>(dx[i]);
    }
    for (size_t k = 0; k < dweight.size(); ++k)
      grad.dweight.row<P>(c)[k] += static_cast<P>(dweight[k]);
    if (grad.dbias) grad.dbias.ptr<P>()[c] += static_cast<P>(dbias);
  }
}

}  // namespace

void causal_conv1d_fwd(Context&, const CausalConv1d& op) {
  dispatch_float(op.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (op.state.dtype == DType::bf16) return forward<T, Full<T>, bf16>(op);
    forward<T, Full<T>, Full<T>>(op);
  });
}

void causal_conv1d_bwd(Context&, const CausalConv1d& op, const CausalConv1dGrad& grad) {
  dispatch_float(op.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward<T, Full<T>>(op, grad);
  });
}

void causal_conv1d_step(Context& ctx, const CausalConv1d& op) {
  std::vector<int32_t> start(static_cast<size_t>(op.x.shape[0] + 1));
  for (size_t i = 0; i < start.size(); ++i) start[i] = static_cast<int32_t>(i);
  CausalConv1d pass = op;
  pass.seq_start = Tensor(start.data(), DType::i32, {op.x.shape[0] + 1});
  reference::causal_conv1d_fwd(ctx, pass);
}

}  // namespace krait::reference
