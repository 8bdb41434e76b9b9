#include "ops/op_parity.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

#include "core/convert.h"
#include "ops/elementwise.h"
#include "ops/engine.h"

namespace krait {

double relative_rms(const std::vector<double>& actual, const std::vector<double>& expected) {
  KRAIT_CHECK(actual.size() == expected.size());
  double error = 0, norm = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  if (norm == 0) norm = actual.empty() ? 1 : static_cast<double>(actual.size());
  return std::sqrt(error / norm);
}

namespace {

constexpr int64_t kChannels = 16;  // of each end

struct Channels {
  int64_t begin, end;
};

std::vector<Channels> some_channels(int64_t d_inner) {
  if (d_inner <= 2 * kChannels) return {{0, d_inner}};
  return {{0, kChannels}, {d_inner - kChannels, d_inner}};
}

// Copies of some channels in the host's memory, and an engine that computes with them.
class Part {
 public:
  Part(Context& ctx, Channels channels)
      : ctx_(ctx),
        channels_(channels),
        expected_(ctx.memory().on_host() ? reference_engine() : cpu_engine(), ctx.threads()) {}

  Context& expected() { return expected_; }

  // What is the same for all channels; none stays none.
  Tensor whole(const Tensor& t) {
    if (!t) return t;
    const Tensor copy = space(t);
    ctx_.engine().synchronize(ctx_);
    ctx_.memory().download(copy.data, t.data, t.bytes());
    return copy;
  }
  // The part's rows of (d_inner, ..) or (d_inner).
  Tensor rows(const Tensor& t) { return t ? whole(t.slice(0, channels_.begin, channels_.end)) : t; }
  // Its columns of (rows, d_inner), which may be strided.
  Tensor columns(const Tensor& t) {
    return t ? dense(t.slice(1, channels_.begin, channels_.end)) : t;
  }
  // Its (slots, k, channels) of (slots, k, d_inner).
  Tensor last(const Tensor& t) {
    if (!t) return t;
    const int64_t slots = t.shape[0], k = t.shape[1];
    return columns(t.reshape({slots * k, t.shape[2]})).reshape({slots, k, count()});
  }
  // Its (slots, channels, k) of (slots, d_inner, k).
  Tensor middle(const Tensor& t) {
    if (!t) return t;
    const int64_t slots = t.shape[0], k = t.shape[2];
    return dense(
               t.reshape({slots, t.shape[1] * k}).slice(1, channels_.begin * k, channels_.end * k))
        .reshape({slots, count(), k});
  }
  // Of the same shape and type as a copy, zero.
  Tensor space(const Tensor& like) {
    Tensor t = like;
    memory_.emplace_back(std::max<size_t>(like.bytes(), 1), host_memory());
    host_memory().zero(memory_.back().data(), memory_.back().bytes());
    t.data = memory_.back().data();
    return t;
  }

  // Of copies; none: 0.
  static double error(const Tensor& actual, const Tensor& expected) {
    return actual ? relative_rms(doubles(actual), doubles(expected)) : 0;
  }

 private:
  static std::vector<double> doubles(const Tensor& t) {
    std::vector<double> values(static_cast<size_t>(t.size()));
    convert_on_host(1, t, Tensor(values.data(), DType::f64, {t.size()}));
    return values;
  }
  int64_t count() const { return channels_.end - channels_.begin; }
  // A copy of strided rows without gaps.
  Tensor dense(const Tensor& t) {
    OwnedTensor rows(t.dtype, {t.shape[0], t.shape[1]}, ctx_.memory());
    copy_elements(ctx_, t, rows);
    return whole(rows);
  }

  Context& ctx_;
  Channels channels_;
  Context expected_;
  std::deque<Buffer> memory_;
};

// The largest, or the first that is no number.
double worse(double a, double b) { return std::isnan(a) || a > b ? a : b; }

Tensor state_of(Part& part, const SelectiveScan& op) { return part.middle(op.state); }
Tensor state_of(Part& part, const CausalConv1d& op) { return part.last(op.state); }

SelectiveScan part_of(Part& part, const SelectiveScan& op) {
  SelectiveScan p = op;
  for (Tensor* t : {&p.u, &p.dt, &p.z, &p.y}) *t = part.columns(*t);
  for (Tensor* t : {&p.A, &p.D, &p.dt_bias}) *t = part.rows(*t);
  for (Tensor* t : {&p.B, &p.C, &p.seq_start, &p.slot}) *t = part.whole(*t);
  p.state = state_of(part, op);
  p.saved = {};
  return p;
}

CausalConv1d part_of(Part& part, const CausalConv1d& op) {
  CausalConv1d p = op;
  for (Tensor* t : {&p.x, &p.y}) *t = part.columns(*t);
  for (Tensor* t : {&p.weight, &p.bias}) *t = part.rows(*t);
  for (Tensor* t : {&p.seq_start, &p.slot}) *t = part.whole(*t);
  p.state = state_of(part, op);
  return p;
}

SelectiveScanGrad part_of(Part& part, const SelectiveScanGrad& grad) {
  SelectiveScanGrad p = grad;
  for (Tensor* t : {&p.dy, &p.du, &p.ddt, &p.dz, &p.y}) *t = part.columns(*t);
  for (Tensor* t : {&p.dA, &p.dD, &p.ddt_bias}) *t = part.rows(*t);
  for (Tensor* t : {&p.dB, &p.dC}) *t = part.space(*t);  // not compared
  p.dstate = {};
  return p;
}
std::vector<Tensor*> outputs(SelectiveScanGrad& g) {
  return {&g.du, &g.ddt, &g.dz, &g.y, &g.dA, &g.dD, &g.ddt_bias};
}

CausalConv1dGrad part_of(Part& part, const CausalConv1dGrad& grad) {
  CausalConv1dGrad p = grad;
  for (Tensor* t : {&p.dy, &p.dx}) *t = part.columns(*t);
  for (Tensor* t : {&p.dweight, &p.dbias}) *t = part.rows(*t);
  p.dstate = {};
  return p;
}
std::vector<Tensor*> outputs(CausalConv1dGrad& g) { return {&g.dx, &g.dweight, &g.dbias}; }

// The inputs are copied first: the pass changes the state.
template <class Op>
double forward_error(Context& ctx, const Op& op, void (*pass)(Context&, const Op&)) {
  std::deque<Part> parts;
  std::vector<Op> inputs;
  for (const Channels c : some_channels(op.y.shape[1])) {
    parts.emplace_back(ctx, c);
    inputs.push_back(part_of(parts.back(), op));
  }
  pass(ctx, op);
  double error = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    pass(parts[i].expected(), inputs[i]);
    error = worse(Part::error(parts[i].columns(op.y), inputs[i].y), error);
    error = worse(Part::error(state_of(parts[i], op), inputs[i].state), error);
  }
  return error;
}

template <class Op, class Grad>
double backward_error(Context& ctx, const Op& op, const Grad& grad,
                      void (*pass)(Context&, const Op&, const Grad&)) {
  pass(ctx, op, grad);
  double error = 0;
  for (const Channels c : some_channels(grad.dy.shape[1])) {
    Part part(ctx, c);
    Grad actual = part_of(part, grad), expected = actual;
    for (Tensor* t : outputs(expected))
      if (*t) *t = part.space(*t);
    pass(part.expected(), part_of(part, op), expected);
    const std::vector<Tensor*> a = outputs(actual), b = outputs(expected);
    for (size_t i = 0; i < a.size(); ++i) error = worse(Part::error(*a[i], *b[i]), error);
  }
  return error;
}

}  // namespace

double selective_scan_fwd_error(Context& ctx, const SelectiveScan& op) {
  KRAIT_CHECK(op.B.shape[1] == 1);
  return forward_error(ctx, op, selective_scan_fwd);
}

double selective_scan_bwd_error(Context& ctx, const SelectiveScan& op,
                                const SelectiveScanGrad& grad) {
  KRAIT_CHECK(op.B.shape[1] == 1);
  return backward_error(ctx, op, grad, selective_scan_bwd);
}

double causal_conv1d_fwd_error(Context& ctx, const CausalConv1d& op) {
  return forward_error(ctx, op, causal_conv1d_fwd);
}

double causal_conv1d_bwd_error(Context& ctx, const CausalConv1d& op, const CausalConv1dGrad& grad) {
  return backward_error(ctx, op, grad, causal_conv1d_bwd);
}

}  // namespace krait
