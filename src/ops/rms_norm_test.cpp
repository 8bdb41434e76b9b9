#include "ops/rms_norm.h"

#include "ops/op_test.h"

namespace krait::op_test {
namespace {

struct Case {
  Case(DType dtype, DType residual, int64_t tokens, int64_t d_model, uint64_t seed)
      : x(dtype, {tokens, d_model}, d_model + 3),
        residual_in(residual, {tokens, d_model}, d_model + 1),
        residual_out(residual, {tokens, d_model}, d_model + 2),
        weight(full(dtype), {d_model}),
        y(dtype, {tokens, d_model}, d_model + 5),
        rstd(full(dtype), {tokens}),
        dy(dtype, {tokens, d_model}),
        dresidual(residual, {tokens, d_model}, d_model + 4),
        dx(dtype, {tokens, d_model}, d_model + 1),
        dweight(full(dtype), {d_model}) {
    Rng rng(seed);
    for (TestTensor* t : {&x, &residual_in, &dy, &dresidual, &dweight}) t->normal(rng);
    weight.normal(rng, 0.3, 1);
  }
  // The same (rounded) inputs in double.
  explicit Case(const Case& o, int64_t tokens, int64_t d_model)
      : Case(DType::f64, DType::f64, tokens, d_model, 1) {
    x.copy(o.x);
    residual_in.copy(o.residual_in);
    weight.copy(o.weight);
    dy.copy(o.dy);
    dresidual.copy(o.dresidual);
    dweight.copy(o.dweight);
  }
  static DType full(DType t) { return t == DType::f64 ? t : DType::f32; }

  RmsNorm op() const {
    return {.x = x,
            .residual_in = residual_in,
            .residual_out = residual_out,
            .weight = weight,
            .y = y,
            .rstd = rstd};
  }
  RmsNormGrad grad() const {
    return {.dy = dy, .dresidual = dresidual, .dx = dx, .dweight = dweight};
  }
  bool guards_intact() const {
    for (const TestTensor* t : {&residual_out, &y, &rstd, &dresidual, &dx, &dweight})
      if (!t->guards_intact()) return false;
    return true;
  }

  TestTensor x, residual_in, residual_out, weight, y, rstd, dy, dresidual, dx, dweight;
};

::testing::AssertionResult close_as(const TestTensor& actual, const TestTensor& oracle,
                                    double tolerance) {
  if (actual.view().dtype == DType::bf16) return close_bf16(actual, oracle.to_double(), tolerance);
  return close(actual, oracle.to_double(), tolerance);
}

TEST(RmsNorm, ReferenceGradientsMatchDifferences) {
  Context ctx(reference_engine(), 1);
  const int64_t tokens = 3, d_model = 7;
  Case c(DType::f64, DType::f64, tokens, d_model, 5);
  TestTensor x(DType::f64, {tokens, d_model}), from_elsewhere(DType::f64, {tokens, d_model});
  x.copy(c.x);
  from_elsewhere.copy(c.dresidual);
  c.dweight.zero();
  RmsNorm op = c.op();
  op.x = x;
  rms_norm_fwd(ctx, op);
  rms_norm_bwd(ctx, op, c.grad());
  const auto objective = [&] {
    rms_norm_fwd(ctx, op);
    const auto y = c.y.to_double(), dy = c.dy.to_double(), r = c.residual_out.to_double(),
               dr = from_elsewhere.to_double();
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i] + r[i] * dr[i];
    return sum;
  };
  Rng rng(3);
  EXPECT_TRUE(gradient_matches(x, c.dx.to_double(), objective, rng));
  EXPECT_TRUE(gradient_matches(c.weight, c.dweight.to_double(), objective, rng));
  EXPECT_EQ(c.dx.to_double(), c.dresidual.to_double());
}

// The CPU's gradients are held against the reference's at the CPU's own residual_out and rstd.
void check_against_reference(DType dtype, DType residual, int64_t tokens, int64_t d_model) {
  SCOPED_TRACE(testing::Message() << tokens << " x " << d_model << " " << name_of(dtype) << " "
                                  << name_of(residual));
  Context ctx(reference_engine(), 2);
  Case c(dtype, residual, tokens, d_model, 11), oracle(c, tokens, d_model);
  reference::rms_norm_fwd(ctx, oracle.op());
  cpu::rms_norm_fwd(ctx, c.op());
  EXPECT_TRUE(close_as(c.residual_out, oracle.residual_out, 1e-6));
  // What is normalised is the stream as it was kept, rounded to its type.
  oracle.residual_in.copy(c.residual_out);
  RmsNorm kept = oracle.op();
  kept.x = {};
  reference::rms_norm_fwd(ctx, kept);
  EXPECT_TRUE(close_as(c.y, oracle.y, 1e-6));
  EXPECT_TRUE(close(c.rstd, oracle.rstd.to_double(), 1e-6));

  oracle.residual_out.copy(c.residual_out);
  oracle.rstd.copy(c.rstd);
  reference::rms_norm_bwd(ctx, oracle.op(), oracle.grad());
  cpu::rms_norm_bwd(ctx, c.op(), c.grad());
  EXPECT_TRUE(close_as(c.dresidual, oracle.dresidual, 1e-5));
  EXPECT_TRUE(close_as(c.dx, oracle.dx, 1e-5));
  EXPECT_TRUE(close(c.dweight, oracle.dweight.to_double(), 1e-5));
  EXPECT_TRUE(c.guards_intact());
}

TEST(RmsNorm, CpuMatchesReference) {
  for_each_simd_target([] {
    for (int64_t d_model : {1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 768, 1001})
      for (int64_t tokens : {1, 3, 65}) {
        check_against_reference(DType::f32, DType::f32, tokens, d_model);
        check_against_reference(DType::bf16, DType::f32, tokens, d_model);
        check_against_reference(DType::bf16, DType::bf16, tokens, d_model);
      }
  });
}

// Leaving out x, residual_out or rstd, or writing the stream in place, changes no bit of y.
TEST(RmsNorm, OptionalTensorsAndInPlace) {
  Context ctx(reference_engine(), 2);
  for (const Engine* engine : {&reference_engine(), static_cast<const Engine*>(nullptr)})
    for (DType residual : {DType::f32, DType::bf16}) {
      const auto fwd = engine ? engine->rms_norm_fwd : cpu::rms_norm_fwd;
      const DType dtype = DType::bf16;
      Case a(dtype, residual, 5, 37, 3), b(dtype, residual, 5, 37, 3);
      fwd(ctx, a.op());
      RmsNorm op = b.op();
      op.residual_out = op.rstd = {};
      fwd(ctx, op);
      EXPECT_TRUE(bitwise_equal(a.y, b.y));
      op.residual_out = op.residual_in;
      fwd(ctx, op);
      EXPECT_TRUE(bitwise_equal(a.y, b.y));
      EXPECT_TRUE(bitwise_equal(a.residual_out, b.residual_in));
      op.x = {};  // the stream is the sum now
      op.residual_out = {};
      fwd(ctx, op);
      EXPECT_TRUE(bitwise_equal(a.y, b.y));
      EXPECT_TRUE(b.residual_in.guards_intact());
    }
}

TEST(RmsNorm, SameBitsForAnyThreadsAndNoTokens) {
  Context one(reference_engine(), 1), two(reference_engine(), 2);
  Case a(DType::bf16, DType::f32, 300, 130, 4), b(DType::bf16, DType::f32, 300, 130, 4);
  for (const auto& [ctx, c] : {std::pair{&one, &a}, std::pair{&two, &b}}) {
    cpu::rms_norm_fwd(*ctx, c->op());
    cpu::rms_norm_bwd(*ctx, c->op(), c->grad());
  }
  for (const auto member : {&Case::y, &Case::dresidual, &Case::dx, &Case::dweight})
    EXPECT_TRUE(bitwise_equal(a.*member, b.*member));
  Case none(DType::f32, DType::f32, 0, 9, 4);
  const std::vector<double> before = none.dweight.to_double();
  rms_norm_fwd(two, none.op());
  cpu::rms_norm_fwd(two, none.op());
  cpu::rms_norm_bwd(two, none.op(), none.grad());
  EXPECT_EQ(none.dweight.to_double(), before);
}

TEST(RmsNorm, EntryRefusesWrongArguments) {
  Context ctx(reference_engine(), 1);
  Case c(DType::bf16, DType::f32, 2, 3, 1);
  rms_norm_fwd(ctx, c.op());
  rms_norm_bwd(ctx, c.op(), c.grad());
  RmsNorm op = c.op();
  op.residual_out = c.dx;
  EXPECT_THROW(rms_norm_fwd(ctx, op), CheckFailure);
  op = c.op();
  op.weight = op.weight.slice(0, 0, 2);
  EXPECT_THROW(rms_norm_fwd(ctx, op), CheckFailure);
  op = c.op();
  op.rstd = {};
  EXPECT_THROW(rms_norm_bwd(ctx, op, c.grad()), CheckFailure);
}

}  // namespace
}  // namespace krait::op_test
