#include "model/mamba_block.h"

#include "ops/causal_conv1d.h"
#include "ops/elementwise.h"
#include "ops/linear.h"
#include "ops/selective_scan.h"

namespace krait {
namespace {

Tensor columns(const Tensor& t, int64_t begin, int64_t end) { return t.slice(1, begin, end); }

// Where dt, B and C stand in x_proj's output, or in its gradient; none for what is not selective.
struct Projections {
  Tensor dt, B, C;  // (tokens, dt_rank), (tokens, 1, d_state) twice

  Projections(const Config& c, const Tensor& x_dbl) {
    int64_t begin = 0;
    const auto next = [&](bool selective, int64_t width) {
      if (!selective) return Tensor();
      begin += width;
      return columns(x_dbl, begin - width, begin);
    };
    dt = next(c.selective_delta, c.dt_rank);
    B = one_group(next(c.selective_B, c.d_state));
    C = one_group(next(c.selective_C, c.d_state));
  }
};

Tensor x_half(const Tensor& xz) { return columns(xz, 0, xz.shape[1] / 2); }
Tensor z_half(const Tensor& xz) { return columns(xz, xz.shape[1] / 2, xz.shape[1]); }

Tensor constant_rows(const Tensor& vector, int64_t tokens) {
  return broadcast_rows(vector.reshape({1, vector.shape[0]}), tokens);
}

// vector (width) += the sum of all rows of x (tokens, 1, width): the gradient of a row that every
// token shares, which is the bias of a linear layer.
void sum_rows(Context& ctx, const Tensor& x, const Tensor& vector) {
  const Tensor dy = x.reshape({x.shape[0], x.shape[2]});
  linear_bwd(ctx, {}, {.dy = dy, .dx = {}, .dweight = {}, .dbias = vector});
}

CausalConv1d conv_op(const BlockArguments& block, const BlockActivations& a) {
  return {.x = x_half(a.xz),
          .weight = block.parameters.conv1d_weight,
          .bias = block.parameters.conv1d_bias,
          .seq_start = block.seq_start,
          .state = block.conv,
          .slot = block.slot,
          .y = a.u};
}

SelectiveScan scan_op(const BlockArguments& block, const BlockActivations& a) {
  const Projections p(block.config, a.x_dbl);
  const int64_t tokens = a.u.shape[0];
  return {.u = a.u,
          .dt = a.dt,
          .A = block.A,
          .B = p.B ? p.B : constant_rows(block.parameters.B_const, tokens),
          .C = p.C ? p.C : constant_rows(block.parameters.C_const, tokens),
          .D = block.parameters.D,
          .dt_bias = block.parameters.dt_proj_bias,
          .z = z_half(a.xz),
          .seq_start = block.seq_start,
          .state = block.ssm,
          .slot = block.slot,
          .y = a.y,
          .saved = a.saved};
}

// From n to what the scan reads; without `products` xz and x_dbl are there already, without `delta`
// dt is not wanted.
template <class Conv>
void project(Context& ctx, const BlockArguments& block, const BlockActivations& a, Conv conv,
             bool products = true, bool delta = true) {
  const LayerParameters& p = block.parameters;
  if (products)
    linear_fwd(ctx, {.x = a.n,
                     .weight = p.in_proj,
                     .bias = p.in_proj_bias,
                     .y = a.xz,
                     .weight_scale = p.in_proj_scale});
  conv(ctx, conv_op(block, a));
  if (products && a.x_dbl)
    linear_fwd(ctx, {.x = a.u,
                     .weight = p.x_proj,
                     .bias = {},
                     .y = a.x_dbl,
                     .weight_scale = {},
                     .settled = true});
  if (delta && p.dt_proj)
    linear_fwd(
        ctx,
        {.x = Projections(block.config, a.x_dbl).dt, .weight = p.dt_proj, .bias = {}, .y = a.dt});
}

}  // namespace

void allocate_scan_inputs(Context& ctx, const Config& c, DType dtype, int64_t tokens,
                          BlockActivations& a) {
  Arena& arena = ctx.workspace();
  a.u = arena.tensor(dtype, {tokens, c.d_inner});
  if (c.selective_delta) {
    a.dt = arena.tensor(dtype, {tokens, c.d_inner});
  } else {
    const Tensor zero = arena.tensor(dtype, {c.d_inner});
    fill_zero(ctx, zero);
    a.dt = broadcast_rows(zero, tokens);
  }
}

void allocate_products(Context& ctx, const Config& c, DType dtype, int64_t tokens, bool saved,
                       BlockActivations& a) {
  Arena& arena = ctx.workspace();
  const DType full = dtype == DType::f64 ? DType::f64 : DType::f32;
  a.xz = arena.tensor(dtype, {tokens, 2 * c.d_inner});
  if (c.x_proj_size() > 0) a.x_dbl = arena.tensor(dtype, {tokens, c.x_proj_size()});
  if (saved)
    a.saved = arena.tensor(full, {selective_scan_saved_size(ctx, tokens, c.d_inner, c.d_state)});
}

BlockActivations allocate_activations(Context& ctx, const Config& c, DType dtype, int64_t tokens) {
  BlockActivations a;
  a.n = ctx.workspace().tensor(dtype, {tokens, c.d_model});
  allocate_scan_inputs(ctx, c, dtype, tokens, a);
  allocate_products(ctx, c, dtype, tokens, /*saved=*/false, a);
  a.y = x_half(a.xz);  // free once the convolution has read it
  return a;
}

BlockActivations rows_of(const BlockActivations& a, int64_t begin, int64_t end) {
  const auto rows = [&](const Tensor& t) { return t ? t.slice(0, begin, end) : t; };
  return {.n = rows(a.n),
          .xz = rows(a.xz),
          .u = rows(a.u),
          .x_dbl = rows(a.x_dbl),
          .dt = rows(a.dt),
          .y = rows(a.y),
          .saved = {}};
}

void block_inputs(Context& ctx, const BlockArguments& block, const BlockActivations& a) {
  project(ctx, block, a, causal_conv1d_fwd);
}

void block_scan(Context& ctx, const BlockArguments& block, const BlockActivations& a, int beside) {
  SelectiveScan op = scan_op(block, a);
  op.beside = beside;
  selective_scan_fwd(ctx, op);
}

void block_output(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                  const Tensor& m) {
  const LayerParameters& p = block.parameters;
  linear_fwd(ctx, {.x = a.y,
                   .weight = p.out_proj,
                   .bias = p.out_proj_bias,
                   .y = m,
                   .weight_scale = p.out_proj_scale});
}

void block_forward(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                   const Tensor& m) {
  block_inputs(ctx, block, a);
  block_scan(ctx, block, a);
  block_output(ctx, block, a, m);
}

void block_step(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                const Tensor& m) {
  const auto conv_step = [](Context& c, CausalConv1d op) {
    op.settled = true;  // in_proj's product comes before it
    causal_conv1d_step(c, op);
  };
  project(ctx, block, a, conv_step, /*products=*/true, /*delta=*/false);
  SelectiveScan scan = scan_op(block, a);
  if (block.parameters.dt_proj) {
    scan.dt = Projections(block.config, a.x_dbl).dt;
    scan.dt_proj = block.parameters.dt_proj;
    scan.settled = true;  // x_proj's product comes before it
  }
  selective_scan_step(ctx, scan);
  block_output(ctx, block, a, m);
}

void block_recompute(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                     bool products) {
  const Arena::Scope scope(ctx.workspace());
  BlockArguments again = block;
  if (block.conv) {
    again.conv.data = ctx.workspace().allocate(block.conv.bytes());
    copy_elements(ctx, block.conv, again.conv);
  }
  project(ctx, again, a, causal_conv1d_fwd, products);
}

void block_backward(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                    const BlockGradients& g, const std::function<void()>& norm_backward) {
  const Config& c = block.config;
  const LayerParameters &p = block.parameters, &dp = g.parameters;
  Arena& arena = ctx.workspace();
  const Arena::Scope scope(arena);
  const int64_t tokens = a.u.shape[0];
  const DType dtype = a.u.dtype;

  const Tensor dy = a.y;
  const Tensor dxz = arena.tensor(dtype, {tokens, 2 * c.d_inner});
  const Tensor y = x_half(dxz);  // until the convolution's backward pass writes dx
  const Linear out_proj = {.x = y, .weight = p.out_proj, .bias = {}, .y = {}};
  linear_bwd(ctx, out_proj, {.dy = g.dm, .dx = dy, .dweight = {}, .dbias = {}});

  // Each in the place of what no other op reads behind the scan's backward pass.
  const Tensor du = dy;
  const Tensor ddt = p.dt_proj ? a.dt : arena.tensor(dtype, {tokens, c.d_inner});
  const Tensor dx_dbl = a.x_dbl ? arena.tensor(dtype, {tokens, c.x_proj_size()}) : Tensor();
  const Projections d(c, dx_dbl);
  const auto per_token = [&] { return arena.tensor(dtype, {tokens, 1, c.d_state}); };
  const Tensor dB = d.B ? d.B : per_token(), dC = d.C ? d.C : per_token();
  const Tensor dA = arena.tensor(block.A.dtype, {c.d_inner, c.d_state});
  fill_zero(ctx, dA);
  selective_scan_bwd(ctx, scan_op(block, a),
                     {.dy = dy,
                      .du = du,
                      .ddt = ddt,
                      .dA = dA,
                      .dB = dB,
                      .dC = dC,
                      .dD = dp.D,
                      .ddt_bias = dp.dt_proj_bias,
                      .dz = z_half(dxz),
                      .dstate = g.dssm,
                      .y = y});
  linear_bwd(ctx, out_proj,
             {.dy = g.dm,
              .dx = {},
              .dweight = dp.out_proj,
              .dbias = dp.out_proj_bias,
              .add_dweight = !g.fresh});
  add_product(ctx, dA, block.A, dp.A_log);  // A = -exp(A_log): dA/dA_log = A
  if (!d.B) sum_rows(ctx, dB, dp.B_const);
  if (!d.C) sum_rows(ctx, dC, dp.C_const);

  if (p.dt_proj)
    linear_bwd(
        ctx, {.x = Projections(c, a.x_dbl).dt, .weight = p.dt_proj, .bias = {}, .y = {}},
        {.dy = ddt, .dx = d.dt, .dweight = dp.dt_proj, .dbias = {}, .add_dweight = !g.fresh});
  if (a.x_dbl) {
    linear_bwd(ctx, {.x = a.u, .weight = p.x_proj, .bias = {}, .y = {}},
               {.dy = dx_dbl,
                .dx = du,
                .dweight = dp.x_proj,
                .dbias = {},
                .add_dx = true,
                .add_dweight = !g.fresh});
  }
  causal_conv1d_bwd(ctx, conv_op(block, a),
                    {.dy = du,
                     .dx = x_half(dxz),
                     .dweight = dp.conv1d_weight,
                     .dbias = dp.conv1d_bias,
                     .dstate = g.dconv});
  const Linear in_proj = {.x = a.n, .weight = p.in_proj, .bias = {}, .y = {}};
  linear_bwd(ctx, in_proj, {.dy = dxz, .dx = g.dn, .dweight = {}, .dbias = {}});
  norm_backward();
  linear_bwd(ctx, in_proj,
             {.dy = dxz,
              .dx = {},
              .dweight = dp.in_proj,
              .dbias = dp.in_proj_bias,
              .add_dweight = !g.fresh});
}

}  // namespace krait
