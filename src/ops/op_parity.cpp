#include "ops/op_parity.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <vector>

#include "core/convert.h"
#include "ops/elementwise.h"
#include "ops/engine.h"

namespace krait {
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
  // The part's columns of (rows, .., d_inner), or its rows of (d_inner, ..) or (d_inner).
  Tensor columns(const Tensor& t) {
    if (!t) return t;
    return whole(dense(t.slice(t.rank - 1, channels_.begin, channels_.end)));
  }
  Tensor rows(const Tensor& t) { return t ? whole(t.slice(0, channels_.begin, channels_.end)) : t; }
  // The part's (slots, channels, d_state) of (slots, d_inner, d_state).
  Tensor middle(const Tensor& t) {
    if (!t) return t;
    Tensor part = t.slice(1, channels_.begin, channels_.end);
    Tensor flat = part;  // rows of one slot
    flat.rank = 2;
    flat.shape = {part.shape[0], part.shape[1] * part.shape[2]};
    flat.stride = {part.stride[0], 1};
    Tensor copy = whole(dense(flat));
    copy.rank = 3;
    copy.shape = part.shape;
    copy.stride[0] = part.shape[1] * part.shape[2];
    copy.stride[1] = part.shape[2];
    copy.stride[2] = 1;
    return copy;
  }
  // Of the same shape and type as a copy, zero.
  Tensor space(const Tensor& like) {
    Tensor t = like;
    memory_.emplace_back(std::max<size_t>(like.bytes(), 1), host_memory());
    host_memory().zero(memory_.back().data(), memory_.back().bytes());
    t.data = memory_.back().data();
    return t;
  }

  // sqrt(sum (a - b)^2 / sum b^2) of copies; b all zero: of a alone.
  static double error(const Tensor& a, const Tensor& b) {
    if (!a) return 0;
    const std::vector<float> x = floats(a), y = floats(b);
    double difference = 0, size = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double d = static_cast<double>(x[i]) - static_cast<double>(y[i]);
      difference += d * d;
      size += static_cast<double>(y[i]) * static_cast<double>(y[i]);
    }
    return std::sqrt(size > 0 ? difference / size : difference);
  }

 private:
  static std::vector<float> floats(const Tensor& t) {
    std::vector<float> values(static_cast<size_t>(t.size()));
    Tensor to = t;
    to.dtype = DType::f32;
    to.data = values.data();
    convert_on_host(1, t, to);
    return values;
  }
  // Strided rows, contiguous in the engine's memory.
  Tensor dense(const Tensor& t) {
    if (t.contiguous()) return t;
    Tensor rows = t;  // (all but the last dimension, the last)
    if (t.rank == 3) {
      rows.rank = 2;
      rows.shape = {t.shape[0] * t.shape[1], t.shape[2]};
      rows.stride = {t.stride[1], 1};
    }
    scratch_.emplace_back(t.dtype, std::initializer_list<int64_t>{rows.shape[0], rows.shape[1]},
                          ctx_.memory());
    copy_elements(ctx_, rows, scratch_.back());
    Tensor copy = scratch_.back();
    if (t.rank == 3) copy = copy.reshape({t.shape[0], t.shape[1], t.shape[2]});
    return copy;
  }

  Context& ctx_;
  Channels channels_;
  Context expected_;
  std::deque<Buffer> memory_;
  std::deque<OwnedTensor> scratch_;
};

// The largest, or the first that is no number.
double worse(double a, double b) { return std::isnan(a) || a > b ? a : b; }

Tensor state_of(Part& part, const SelectiveScan& op) { return part.middle(op.state); }
Tensor state_of(Part& part, const CausalConv1d& op) { return part.columns(op.state); }

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

}  // namespace

double selective_scan_fwd_error(Context& ctx, const SelectiveScan& op) {
  KRAIT_CHECK(op.B.shape[1] == 1);
  return forward_error(ctx, op, selective_scan_fwd);
}

double selective_scan_bwd_error(Context& ctx, const SelectiveScan& op,
                                const SelectiveScanGrad& grad) {
  KRAIT_CHECK(op.B.shape[1] == 1);
  selective_scan_bwd(ctx, op, grad);
  double error = 0;
  for (const Channels c : some_channels(op.u.shape[1])) {
    Part part(ctx, c);
    const SelectiveScan inputs = part_of(part, op);
    SelectiveScanGrad actual = grad;
    actual.dy = part.columns(grad.dy);
    for (Tensor* t : {&actual.du, &actual.ddt, &actual.dz, &actual.y}) *t = part.columns(*t);
    for (Tensor* t : {&actual.dA, &actual.dD, &actual.ddt_bias}) *t = part.rows(*t);
    actual.dB = actual.dC = part.space(inputs.B);
    actual.dstate = {};
    SelectiveScanGrad expected = actual;
    const auto outputs = [](SelectiveScanGrad& g) {
      return std::array<Tensor*, 7>{&g.du, &g.ddt, &g.dz, &g.y, &g.dA, &g.dD, &g.ddt_bias};
    };
    for (Tensor* t : outputs(expected))
      if (*t) *t = part.space(*t);
    expected.dC = part.space(inputs.C);
    selective_scan_bwd(part.expected(), inputs, expected);
    const auto a = outputs(actual), b = outputs(expected);
    for (size_t i = 0; i < a.size(); ++i) error = worse(Part::error(*a[i], *b[i]), error);
  }
  return error;
}

double causal_conv1d_fwd_error(Context& ctx, const CausalConv1d& op) {
  return forward_error(ctx, op, causal_conv1d_fwd);
}

double causal_conv1d_bwd_error(Context& ctx, const CausalConv1d& op, const CausalConv1dGrad& grad) {
  causal_conv1d_bwd(ctx, op, grad);
  double error = 0;
  for (const Channels c : some_channels(op.x.shape[1])) {
    Part part(ctx, c);
    const CausalConv1d inputs = part_of(part, op);
    CausalConv1dGrad actual = grad;
    actual.dy = part.columns(grad.dy);
    actual.dx = part.columns(grad.dx);
    actual.dweight = part.rows(grad.dweight);
    actual.dbias = part.rows(grad.dbias);
    actual.dstate = {};
    CausalConv1dGrad expected = actual;
    for (Tensor* t : {&expected.dx, &expected.dweight, &expected.dbias})
      if (*t) *t = part.space(*t);
    causal_conv1d_bwd(part.expected(), inputs, expected);
    error = worse(Part::error(actual.dx, expected.dx), error);
    error = worse(Part::error(actual.dweight, expected.dweight), error);
    error = worse(Part::error(actual.dbias, expected.dbias), error);
  }
  return error;
}

}  // namespace krait
