#include "ops/selective_scan.h"

#include "ops/check.h"
#include "ops/engine.h"
#include "ops/linear.h"

namespace krait {
namespace {

struct Shape {
  int64_t tokens, d_inner, d_state, n_groups;
};

Shape check_inputs(const SelectiveScan& op) {
  const DType type = op.u.dtype, full = full_precision(op.u);
  check_tensor(op.u, "u", type, {-1, -1});
  check_tensor(op.B, "B", type, {op.u.shape[0], -1, -1});
  const Shape s = {op.u.shape[0], op.u.shape[1], op.B.shape[2], op.B.shape[1]};
  KRAIT_CHECK(s.d_state >= 1 && s.d_state <= kMaxDState, "d_state is " + std::to_string(s.d_state));
  KRAIT_CHECK(s.n_groups >= 1 && s.d_inner % s.n_groups == 0, "n_groups does not divide d_inner");
  check_tensor(op.C, "C", type, {s.tokens, s.n_groups, s.d_state});
  check_tensor(op.dt, "dt", type, {s.tokens, op.dt_proj ? op.dt_proj.shape[1] : s.d_inner});
  check_optional(op.dt_proj, "dt_proj", type, {s.d_inner, -1});
  KRAIT_CHECK(!op.dt_proj || op.dt_proj.contiguous());
  check_tensor(op.A, "A", full, {s.d_inner, s.d_state});
  KRAIT_CHECK(op.A.contiguous());
  check_optional(op.D, "D", full, {s.d_inner});
  check_optional(op.dt_bias, "dt_bias", full, {s.d_inner});
  check_optional(op.z, "z", type, {s.tokens, s.d_inner});
  check_state(op.state, full, {-1, s.d_inner, s.d_state});
  return s;
}

void check_saved(const Context& ctx, const SelectiveScan& op, const Shape& s) {
  check_optional(op.saved, "saved", full_precision(op.u),
                 {selective_scan_saved_size(ctx, s.tokens, s.d_inner, s.d_state)});
}

}  // namespace

Tensor one_group(Tensor t) {
  if (!t) return t;
  t.rank = 3;
  t.shape = {t.shape[0], 1, t.shape[1]};
  t.stride = {t.stride[0], t.stride[1] * t.shape[2], t.stride[1]};
  return t;
}

Cost selective_scan_cost(const SelectiveScan& op) {
  const double elements = static_cast<double>(op.u.size()),
               d_state = static_cast<double>(op.A.shape[1]);
  const double streams = op.z ? 4 : 3;  // u, dt, z in, y out
  const double bc =
      2.0 * static_cast<double>(op.u.shape[0]) * static_cast<double>(op.B.shape[1]) * d_state;
  return {.flops = elements * (d_state * 6 + 6),
          .bytes = (elements * streams + bc) * static_cast<double>(size_of(op.u.dtype)),
          .exps = elements * d_state};
}

// A sequence's first chunk starts from `state`; every later chunk starts scan_chunk tokens or more
// after the one before.
int64_t selective_scan_saved_size(const Context& ctx, int64_t tokens, int64_t d_inner,
                                  int64_t d_state) {
  return tokens / ctx.engine().scan_chunk * d_inner * d_state;
}

int64_t selective_scan_stage(Context& ctx, int64_t tokens, int64_t num_seqs, int64_t d_inner,
                             int64_t d_state) {
  const auto stage = ctx.engine().scan_stage;
  return stage ? stage(ctx, tokens, num_seqs, d_inner, d_state) : tokens;
}

void selective_scan_fwd(Context& ctx, const SelectiveScan& op) {
  const Shape s = check_inputs(op);
  KRAIT_CHECK(!op.dt_proj);
  check_tensor(op.y, "y", op.u.dtype, {s.tokens, s.d_inner});
  check_sequences(ctx, op.seq_start, op.slot, op.state, s.tokens);
  check_saved(ctx, op, s);
  if (s.tokens > 0) ctx.engine().selective_scan_fwd(ctx, op);
}

void selective_scan_bwd(Context& ctx, const SelectiveScan& op, const SelectiveScanGrad& grad) {
  const Shape s = check_inputs(op);
  const DType type = op.u.dtype, full = full_precision(op.u);
  KRAIT_CHECK(!op.dt_proj);
  check_optional(op.state, "state", full, {-1, s.d_inner, s.d_state});
  check_sequences(ctx, op.seq_start, op.slot, op.state, s.tokens);
  check_saved(ctx, op, s);
  check_tensor(grad.dy, "dy", type, {s.tokens, s.d_inner});
  check_tensor(grad.du, "du", type, {s.tokens, s.d_inner});
  check_tensor(grad.ddt, "ddt", type, {s.tokens, s.d_inner});
  check_tensor(grad.dA, "dA", full, {s.d_inner, s.d_state});
  check_tensor(grad.dB, "dB", type, {s.tokens, s.n_groups, s.d_state});
  check_tensor(grad.dC, "dC", type, {s.tokens, s.n_groups, s.d_state});
  check_optional(grad.dD, "dD", full, {s.d_inner});
  check_optional(grad.ddt_bias, "ddt_bias", full, {s.d_inner});
  check_optional(grad.dz, "dz", type, {s.tokens, s.d_inner});
  KRAIT_CHECK(!op.D == !grad.dD && !op.dt_bias == !grad.ddt_bias && !op.z == !grad.dz);
  check_optional(grad.dstate, "dstate", full, {-1, s.d_inner, s.d_state});
  KRAIT_CHECK(grad.dA.contiguous() && (!grad.dstate || grad.dstate.contiguous()));
  check_slots(ctx, op.slot, grad.dstate, op.seq_start.shape[0] - 1);
  check_optional(grad.y, "y", type, {s.tokens, s.d_inner});
  if (s.tokens > 0) ctx.engine().selective_scan_bwd(ctx, op, grad);
}

void selective_scan_step(Context& ctx, const SelectiveScan& op) {
  const Shape s = check_inputs(op);
  KRAIT_CHECK(op.state && !op.seq_start && !op.saved);
  check_tensor(op.y, "y", op.u.dtype, {s.tokens, s.d_inner});
  check_slots(ctx, op.slot, op.state, s.tokens);
  if (s.tokens == 0) return;
  const Engine& engine = ctx.engine();
  if (!op.dt_proj || (engine.scan_step_projects && engine.scan_step_projects(ctx, op)))
    return engine.selective_scan_step(ctx, op);
  const Arena::Scope scope(ctx.workspace());
  SelectiveScan projected = op;
  projected.dt = ctx.workspace().tensor(op.u.dtype, {s.tokens, s.d_inner});
  projected.dt_proj = {};
  linear_fwd(ctx, {.x = op.dt, .weight = op.dt_proj, .bias = {}, .y = projected.dt});
  engine.selective_scan_step(ctx, projected);
}

}  // namespace krait
