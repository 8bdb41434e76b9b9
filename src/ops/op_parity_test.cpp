#include "ops/op_parity.h"

#include <cmath>
#include <deque>
#include <limits>

#include "ops/deferred_engine.h"
#include "ops/engine.h"
#include "ops/op_test.h"

namespace krait {
namespace {

using op_test::deferred_engine;

// Inputs in the memory of a context's engine.
struct Case {
  Case(Context& c, int64_t d_inner, DType type) : ctx(c), width(d_inner), dtype(type) {}

  OwnedTensor& take(DType type, std::initializer_list<int64_t> shape) {
    tensors.emplace_back(type, shape, ctx.memory());
    return tensors.back();
  }
  Tensor zeros(std::initializer_list<int64_t> shape) { return take(DType::f32, shape); }
  Tensor normal(DType type, std::initializer_list<int64_t> shape, double sd = 1, double mean = 0) {
    op_test::TestTensor host(type, shape);
    host.normal(rng, sd, mean);
    OwnedTensor& t = take(type, shape);
    t.upload(host.view().data);
    return t;
  }
  Tensor activations() { return normal(dtype, {tokens, width}); }
  Tensor seq_start() {
    const std::vector<int32_t> starts = {0, 33, 33, static_cast<int32_t>(tokens)};
    OwnedTensor& t = take(DType::i32, {4});
    t.upload(starts.data());
    return t;
  }

  SelectiveScan scan() {
    return {.u = activations(),
            .dt = activations(),
            .A = normal(DType::f32, {width, 16}, 0.3, -2),
            .B = normal(dtype, {tokens, 1, 16}),
            .C = normal(dtype, {tokens, 1, 16}),
            .D = normal(DType::f32, {width}),
            .dt_bias = normal(DType::f32, {width}),
            .z = activations(),
            .seq_start = seq_start(),
            .state = normal(DType::f32, {3, width, 16}),
            .slot = {},
            .y = activations(),
            .saved = {}};
  }
  SelectiveScanGrad scan_grad() {
    return {.dy = activations(),
            .du = activations(),
            .ddt = activations(),
            .dA = zeros({width, 16}),
            .dB = normal(dtype, {tokens, 1, 16}),
            .dC = normal(dtype, {tokens, 1, 16}),
            .dD = zeros({width}),
            .ddt_bias = zeros({width}),
            .dz = activations(),
            .dstate = {},
            .y = {}};
  }
  CausalConv1d conv() {
    return {.x = activations(),
            .weight = normal(DType::f32, {width, 4}),
            .bias = normal(DType::f32, {width}),
            .seq_start = seq_start(),
            .state = normal(DType::f32, {3, 3, width}),
            .slot = {},
            .y = activations()};
  }
  CausalConv1dGrad conv_grad() {
    return {.dy = activations(),
            .dx = activations(),
            .dweight = zeros({width, 4}),
            .dbias = zeros({width}),
            .dstate = {}};
  }

  Context& ctx;
  int64_t width, tokens = 70;
  DType dtype;
  Rng rng{3};
  std::deque<OwnedTensor> tensors;
};

struct Errors {
  double scan_fwd, scan_bwd, conv_fwd, conv_bwd;
};

Errors errors_on(const Engine& engine, int64_t d_inner, DType dtype) {
  Context ctx(engine, 1);
  Case scan(ctx, d_inner, dtype), scan_back(ctx, d_inner, dtype), conv(ctx, d_inner, dtype),
      conv_back(ctx, d_inner, dtype);
  return {selective_scan_fwd_error(ctx, scan.scan()),
          selective_scan_bwd_error(ctx, scan_back.scan(), scan_back.scan_grad()),
          causal_conv1d_fwd_error(ctx, conv.conv()),
          causal_conv1d_bwd_error(ctx, conv_back.conv(), conv_back.conv_grad())};
}

TEST(OpParity, EnginesAgree) {
  for (const int64_t d_inner : {5, 32, 90})
    for (const DType dtype : {DType::f32, DType::bf16})
      for (const Engine* engine : {&cpu_engine(), &deferred_engine()}) {
        const Errors e = errors_on(*engine, d_inner, dtype);
        for (const double error : {e.scan_fwd, e.scan_bwd, e.conv_fwd, e.conv_bwd})
          EXPECT_LE(error, dtype == DType::f32 ? 1e-6 : 1e-3) << d_inner;
      }
}

// The last channel's results alone, and what is no number.
TEST(OpParity, SeesWhatDiffers) {
  Engine other = cpu_engine();
  const auto spoil = [](const Tensor& t, float by) {
    float* last = t.row<float>(t.shape[0] - 1) + (t.rank == 2 ? t.shape[1] - 1 : 0);
    *last = *last * by + 1;
  };
  static float by;
  by = 1;
  static auto spoiled = spoil;
  other.selective_scan_fwd = [](Context& ctx, const SelectiveScan& op) {
    cpu_engine().selective_scan_fwd(ctx, op);
    spoiled(op.y, by);
  };
  other.selective_scan_bwd = [](Context& ctx, const SelectiveScan& op,
                                const SelectiveScanGrad& grad) {
    cpu_engine().selective_scan_bwd(ctx, op, grad);
    spoiled(grad.ddt_bias, by);
  };
  other.causal_conv1d_fwd = [](Context& ctx, const CausalConv1d& op) {
    cpu_engine().causal_conv1d_fwd(ctx, op);
    spoiled(op.state, by);
  };
  other.causal_conv1d_bwd = [](Context& ctx, const CausalConv1d& op, const CausalConv1dGrad& grad) {
    cpu_engine().causal_conv1d_bwd(ctx, op, grad);
    spoiled(grad.dweight, by);
  };
  const Errors wrong = errors_on(other, 90, DType::f32);
  for (const double error : {wrong.scan_fwd, wrong.scan_bwd, wrong.conv_fwd, wrong.conv_bwd})
    EXPECT_GT(error, 1e-3);
  by = std::numeric_limits<float>::quiet_NaN();
  const Errors none = errors_on(other, 90, DType::f32);
  for (const double error : {none.scan_fwd, none.scan_bwd, none.conv_fwd, none.conv_bwd})
    EXPECT_TRUE(std::isnan(error));
}

}  // namespace
}  // namespace krait
