// The specification of the selective scan: one channel at a time, states in double. Read it beside
// section 3.2 of the paper.
#include <cmath>
#include <vector>

#include "ops/engine.h"
#include "ops/ref_math.h"

namespace krait::reference {
namespace {

// T: element type of activations; P: of parameters (f32, or f64 when T is); S: of states.
template <class T, class P>
struct Channel {
  const SelectiveScan& op;
  int64_t c, group, d_state;

  Channel(const SelectiveScan& scan, int64_t channel)
      : op(scan),
        c(channel),
        group(channel / (scan.u.shape[1] / scan.B.shape[1])),
        d_state(scan.A.shape[1]) {}

  double A(int64_t n) const { return op.A.row<P>(c)[n]; }
  double B(int64_t t, int64_t n) const { return op.B.row<T>(t)[group * op.B.stride[1] + n]; }
  double C(int64_t t, int64_t n) const { return op.C.row<T>(t)[group * op.C.stride[1] + n]; }
  double u(int64_t t) const { return op.u.row<T>(t)[c]; }
  double z(int64_t t) const { return op.z.row<T>(t)[c]; }
  double D() const { return op.D ? op.D.ptr<P>()[c] : P(0); }
  double dt(int64_t t) const {
    const double bias = op.dt_bias ? op.dt_bias.ptr<P>()[c] : P(0);
    return op.dt.row<T>(t)[c] + bias;
  }

  // One token: h becomes h_t; gives C_t h_t + D u_t.
  double advance(int64_t t, std::vector<double>& h) const {
    const double delta = softplus(dt(t));
    double y = D() * u(t);
    for (int64_t n = 0; n < d_state; ++n) {
      double& h_n = h[static_cast<size_t>(n)];
      h_n = std::exp(delta * A(n)) * h_n + delta * B(t, n) * u(t);
      y += C(t, n) * h_n;
    }
    return y;
  }
};

template <class S>
S* state_of(const Tensor& state, const Tensor& slot, int64_t sequence, int64_t channel) {
  if (!state) return nullptr;
  const int64_t s = slot ? slot.ptr<int32_t>()[sequence] : sequence;
  return state.row<S>(s) + channel * state.stride[1];
}

template <class T, class P, class S>
void forward(const SelectiveScan& op) {
  const int32_t* start = op.seq_start.ptr<int32_t>();
  std::vector<double> h(static_cast<size_t>(op.A.shape[1]));
  for (int64_t s = 0; s < op.seq_start.shape[0] - 1; ++s)
    for (int64_t c = 0; c < op.u.shape[1]; ++c) {
      const Channel<T, P> channel(op, c);
      S* state = state_of<S>(op.state, op.slot, s, c);
      for (size_t n = 0; n < h.size(); ++n) h[n] = state ? static_cast<double>(state[n]) : 0;
      for (int64_t t = start[s]; t < start[s + 1]; ++t) {
        double y = channel.advance(t, h);
        if (op.z) y *= channel.z(t) * sigmoid(channel.z(t));
        op.y.row<T>(t)[c] = static_cast<T>(y);
      }
      for (size_t n = 0; n < h.size() && state; ++n) state[n] = static_cast<S>(h[n]);
    }
}

// Gradients of one channel over one sequence. dB and dC are summed over channels by the caller's
// double buffers.
template <class T, class P>
void backward_channel(const SelectiveScan& op, const SelectiveScanGrad& grad, int64_t s, int64_t c,
                      std::vector<double>& dB, std::vector<double>& dC) {
  const Channel<T, P> channel(op, c);
  const int64_t begin = op.seq_start.ptr<int32_t>()[s], end = op.seq_start.ptr<int32_t>()[s + 1];
  const size_t d_state = static_cast<size_t>(channel.d_state);
  // states[i] is h before token begin + i.
  std::vector<std::vector<double>> states(1, std::vector<double>(d_state));
  if (const P* state = state_of<P>(op.state, op.slot, s, c))
    for (size_t n = 0; n < d_state; ++n) states[0][n] = state[n];
  std::vector<double> y;
  for (int64_t t = begin; t < end; ++t) {
    states.push_back(states.back());
    y.push_back(channel.advance(t, states.back()));
  }
  P* dstate = state_of<P>(grad.dstate, op.slot, s, c);
  std::vector<double> dh(d_state), dA(d_state);
  for (size_t n = 0; n < d_state && dstate; ++n) dh[n] = dstate[n];
  double dD = 0, ddt_bias = 0;
  for (int64_t t = end - 1; t >= begin; --t) {
    const size_t i = static_cast<size_t>(t - begin);
    double dy = grad.dy.row<T>(t)[c];
    if (grad.y) {
      const double z = op.z ? channel.z(t) : 0;
      grad.y.row<T>(t)[c] = static_cast<T>(op.z ? y[i] * z * sigmoid(z) : y[i]);
    }
    if (op.z) {
      const double z = channel.z(t), sig = sigmoid(z);
      grad.dz.row<T>(t)[c] = static_cast<T>(dy * y[i] * sig * (1 + z * (1 - sig)));
      dy *= z * sig;
    }
    const double delta = softplus(channel.dt(t)), u = channel.u(t);
    double du = channel.D() * dy, ddelta = 0;
    dD += dy * u;
    for (size_t n = 0; n < d_state; ++n) {
      const int64_t ni = static_cast<int64_t>(n);
      const size_t bc = (static_cast<size_t>(t) * static_cast<size_t>(op.B.shape[1]) +
                         static_cast<size_t>(channel.group)) *
                            d_state +
                        n;
      dh[n] += dy * channel.C(t, ni);
      dC[bc] += dy * states[i + 1][n];
      dB[bc] += dh[n] * delta * u;
      du += dh[n] * delta * channel.B(t, ni);
      const double A_bar = std::exp(delta * channel.A(ni)),
                   through_A = dh[n] * A_bar * states[i][n];
      ddelta += dh[n] * channel.B(t, ni) * u + through_A * channel.A(ni);
      dA[n] += through_A * delta;
      dh[n] *= A_bar;
    }
    grad.du.row<T>(t)[c] = static_cast<T>(du);
    const double ddt = ddelta * sigmoid(channel.dt(t));
    grad.ddt.row<T>(t)[c] = static_cast<T>(ddt);
    ddt_bias += ddt;
  }
  for (size_t n = 0; n < d_state; ++n) {
    grad.dA.row<P>(c)[n] += static_cast<P>(dA[n]);
    if (dstate) dstate[n] = static_cast<P>(dh[n]);
  }
  if (grad.dD) grad.dD.ptr<P>()[c] += static_cast<P>(dD);
  if (grad.ddt_bias) grad.ddt_bias.ptr<P>()[c] += static_cast<P>(ddt_bias);
}

template <class T, class P>
void backward(const SelectiveScan& op, const SelectiveScanGrad& grad) {
  std::vector<double> dB(static_cast<size_t>(op.B.size())), dC(dB.size());
  for (int64_t s = 0; s < op.seq_start.shape[0] - 1; ++s)
    for (int64_t c = 0; c < op.u.shape[1]; ++c) backward_channel<T, P>(op, grad, s, c, dB, dC);
  size_t i = 0;
  for (int64_t t = 0; t < op.B.shape[0]; ++t)
    for (int64_t g = 0; g < op.B.shape[1]; ++g)
      for (int64_t n = 0; n < op.B.shape[2]; ++n, ++i) {
        grad.dB.row<T>(t)[g * grad.dB.stride[1] + n] = static_cast<T>(dB[i]);
        grad.dC.row<T>(t)[g * grad.dC.stride[1] + n] = static_cast<T>(dC[i]);
      }
}

}  // namespace

void selective_scan_fwd(Context&, const SelectiveScan& op) {
  dispatch_float(op.u.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (op.state.dtype == DType::bf16) return forward<T, Full<T>, bf16>(op);
    forward<T, Full<T>, Full<T>>(op);
  });
}

void selective_scan_bwd(Context&, const SelectiveScan& op, const SelectiveScanGrad& grad) {
  dispatch_float(op.u.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward<T, Full<T>>(op, grad);
  });
}

// A step is a pass over sequences of one token.
void selective_scan_step(Context& ctx, const SelectiveScan& op) {
  std::vector<int32_t> start(static_cast<size_t>(op.u.shape[0] + 1));
  for (size_t i = 0; i < start.size(); ++i) start[i] = static_cast<int32_t>(i);
  SelectiveScan pass = op;
  pass.seq_start = Tensor(start.data(), DType::i32, {op.u.shape[0] + 1});
  reference::selective_scan_fwd(ctx, pass);
}

}  // namespace krait::reference
