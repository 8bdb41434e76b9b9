#include "ops/rms_norm.h"

#include "ops/op_test.h"

namespace krait::op_test {
namespace {

struct Case {
  // Row strides are odd, or d_model and a few times `align`.
  Case(DType dtype, DType residual, int64_t tokens, int64_t d_model, uint64_t seed,
       int64_t align = 1)
      : x(dtype, {tokens, d_model}, d_model + 3 * align),
        residual_in(residual, {tokens, d_model}, d_model + align),
        residual_out(residual, {tokens, d_model}, d_model + 2 * align),
        weight(full(dtype), {d_model}),
        y(dtype, {tokens, d_model}, d_model + 5 * align),
        rstd(full(dtype), {tokens}),
        dy(dtype, {tokens, d_model}),
        dresidual(residual, {tokens, d_model}, d_model + 4 * align),
        dx(dtype, {tokens, d_model}, d_model + align),
        y_again(dtype, {tokens, d_model}, d_model + align),
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
    return {.x = {x},
            .residual_in = residual_in,
            .residual_out = residual_out,
            .weight = weight,
            .y = y,
            .rstd = rstd};
  }
  RmsNormGrad grad() const {
    return {.dy = dy, .dresidual = dresidual, .dx = dx, .dweight = dweight, .y = y_again};
  }
  // Terms of r beside x, and the op with all of them.
  void add_terms(uint64_t seed, int64_t align) {
    Rng rng(seed);
    for (int k = 1; k < kMaxAddends; ++k) {
      const int64_t tokens = x.view().shape[0], d_model = x.view().shape[1];
      more.emplace_back(x.view().dtype, std::initializer_list<int64_t>{tokens, d_model},
                        d_model + 2 * align);
      more.back().normal(rng);
    }
  }
  RmsNorm sum() const {
    RmsNorm s = op();
    for (size_t k = 0; k < more.size(); ++k) s.x[k + 1] = more[k];
    return s;
  }
  bool guards_intact() const {
    for (const TestTensor* t : {&residual_out, &y, &rstd, &dresidual, &dx, &dweight, &y_again})
      if (!t->guards_intact()) return false;
    return true;
  }

  TestTensor x, residual_in, residual_out, weight, y, rstd, dy, dresidual, dx, y_again, dweight;
  std::vector<TestTensor> more;
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
  op.x = {x};
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

// The gradients are held against the reference's at the engine's own residual_out and rstd.
void check_against_reference(Context& ctx, Case& c, double forward_tolerance) {
  const int64_t tokens = c.y.view().shape[0], d_model = c.y.view().shape[1];
  SCOPED_TRACE(testing::Message() << tokens << " x " << d_model << " " << name_of(c.y.view().dtype)
                                  << " " << name_of(c.residual_in.view().dtype));
  Context reference(reference_engine(), 2);
  Case oracle(c, tokens, d_model);
  rms_norm_fwd(reference, oracle.op());
  rms_norm_fwd(ctx, c.op());
  EXPECT_TRUE(close_as(c.residual_out, oracle.residual_out, 1e-6));
  // What is normalised is the stream as it was kept, rounded to its type.
  oracle.residual_in.copy(c.residual_out);
  RmsNorm kept = oracle.op();
  kept.x = {};
  rms_norm_fwd(reference, kept);
  EXPECT_TRUE(close_as(c.y, oracle.y, forward_tolerance));
  EXPECT_TRUE(close(c.rstd, oracle.rstd.to_double(), forward_tolerance));

  oracle.residual_out.copy(c.residual_out);
  oracle.rstd.copy(c.rstd);
  rms_norm_bwd(reference, oracle.op(), oracle.grad());
  rms_norm_bwd(ctx, c.op(), c.grad());
  EXPECT_TRUE(close_as(c.dresidual, oracle.dresidual, 1e-5));
  EXPECT_TRUE(close_as(c.dx, oracle.dx, 1e-5));
  EXPECT_TRUE(close(c.dweight, oracle.dweight.to_double(), 1e-5));
  EXPECT_TRUE(bitwise_equal(c.y_again, c.y));
  EXPECT_TRUE(c.guards_intact());
}

// {activations, residual stream}
const std::vector<std::pair<DType, DType>> kTypes = {
    {DType::f32, DType::f32}, {DType::bf16, DType::f32}, {DType::bf16, DType::bf16}};

TEST(RmsNorm, CpuMatchesReference) {
  for_each_simd_target([] {
    Context ctx(cpu_engine(), 2);
    for (int64_t d_model : {1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 768, 1001})
      for (int64_t tokens : {1, 3, 65})
        for (auto [dtype, residual] : kTypes) {
          Case c(dtype, residual, tokens, d_model, 11);
          check_against_reference(ctx, c, 1e-6);
        }
  });
}

// Odd strides: rows are read twice. Strides of 8: rows lie in registers, several to a warp, one to
// a warp or one to a block; beyond 16384 they are read twice again.
TEST(RmsNormCuda, MatchesReference) {
  on_cuda([](Context& ctx) {
    for (auto [dtype, residual] : kTypes) {
      for (int64_t d_model : {1, 7, 33, 768, 1001})
        for (int64_t tokens : {1, 65}) {
          Case c(dtype, residual, tokens, d_model, 11);
          check_against_reference(ctx, c, 3e-6);
        }
      for (int64_t d_model : {8, 16, 64, 72, 248, 264, 768, 1024, 1032, 2560, 16384, 16392})
        for (int64_t tokens : {1, 3, 300}) {
          if (tokens * d_model > 800'000) continue;
          Case c(dtype, residual, tokens, d_model, 11, 8);
          check_against_reference(ctx, c, 3e-6);
        }
    }
    Case large(DType::bf16, DType::f32, 9000, 64, 11, 8);  // blocks that take several rows
    check_against_reference(ctx, large, 3e-6);
  });
}

// Leaving out x, residual_out or rstd, or writing the stream in place, changes no bit of y.
void check_optional_and_in_place(Context& ctx, int64_t d_model) {
  for (DType residual : {DType::f32, DType::bf16}) {
    const DType dtype = DType::bf16;
    Case a(dtype, residual, 5, d_model, 3, 8), b(dtype, residual, 5, d_model, 3, 8);
    rms_norm_fwd(ctx, a.op());
    RmsNorm op = b.op();
    op.residual_out = op.rstd = {};
    rms_norm_fwd(ctx, op);
    EXPECT_TRUE(bitwise_equal(a.y, b.y));
    op.residual_out = op.residual_in;
    rms_norm_fwd(ctx, op);
    EXPECT_TRUE(bitwise_equal(a.y, b.y));
    EXPECT_TRUE(bitwise_equal(a.residual_out, b.residual_in));
    op.x = {};  // the stream is the sum now
    op.residual_out = {};
    rms_norm_fwd(ctx, op);
    EXPECT_TRUE(bitwise_equal(a.y, b.y));
    EXPECT_TRUE(b.residual_in.guards_intact());
  }
}

TEST(RmsNorm, OptionalTensorsAndInPlace) {
  for (const Engine* engine : {&reference_engine(), &cpu_engine()}) {
    Context ctx(*engine, 2);
    check_optional_and_in_place(ctx, 37);
  }
}

TEST(RmsNormCuda, OptionalTensorsAndInPlace) {
  on_cuda([](Context& ctx) {
    for (int64_t d_model : {37, 64, 1280}) check_optional_and_in_place(ctx, d_model);
  });
}

// A sum has the bits of a stream that is kept after each of its terms, forward and backward, and
// gradients those that they have elsewhere where they take the place of what they are made of.
void check_sums(Context& ctx, int64_t tokens, int64_t d_model, DType dtype, DType residual) {
  SCOPED_TRACE(testing::Message() << tokens << " x " << d_model << " " << name_of(dtype) << " "
                                  << name_of(residual));
  Case kept(dtype, residual, tokens, d_model, 3, 8), sum(dtype, residual, tokens, d_model, 3, 8);
  for (Case* c : {&kept, &sum}) c->add_terms(5, 8);
  rms_norm_fwd(ctx, kept.op());
  RmsNorm op = kept.op();
  op.residual_in = op.residual_out;
  for (const TestTensor& x : kept.more) {
    op.x = {x};
    rms_norm_fwd(ctx, op);
  }
  rms_norm_fwd(ctx, sum.sum());
  for (const auto member : {&Case::y, &Case::rstd, &Case::residual_out})
    EXPECT_TRUE(bitwise_equal(sum.*member, kept.*member));

  rms_norm_bwd(ctx, kept.op(), kept.grad());
  RmsNorm lost = sum.sum();
  lost.residual_out = {};
  RmsNormGrad grad = sum.grad();
  grad.y = grad.dy;
  grad.dx = lost.x[2];
  rms_norm_bwd(ctx, lost, grad);
  EXPECT_TRUE(bitwise_equal(sum.dresidual, kept.dresidual));
  EXPECT_TRUE(bitwise_equal(sum.dweight, kept.dweight));
  EXPECT_TRUE(bitwise_equal(grad.dx, kept.dx));
  EXPECT_TRUE(bitwise_equal(grad.y, kept.y_again));
  EXPECT_TRUE(sum.guards_intact());
}

TEST(RmsNorm, SumsAreAsIfKept) {
  for (const Engine* engine : {&reference_engine(), &cpu_engine()}) {
    Context ctx(*engine, 2);
    for (auto [dtype, residual] : kTypes)
      for (int64_t d_model : {1, 37, 64}) check_sums(ctx, 70, d_model, dtype, residual);
  }
}

TEST(RmsNormCuda, SumsAreAsIfKept) {
  on_cuda([](Context& ctx) {
    for (auto [dtype, residual] : kTypes)
      for (auto [tokens, d_model] :
           {std::pair<int64_t, int64_t>{300, 37}, {9000, 8}, {300, 768}, {100, 1280}, {3, 16392}})
        check_sums(ctx, tokens, d_model, dtype, residual);
  });
}

void check_same_bits(Context& one, Context& two, int64_t tokens, int64_t d_model) {
  Case a(DType::bf16, DType::f32, tokens, d_model, 4, 8),
      b(DType::bf16, DType::f32, tokens, d_model, 4, 8);
  for (const auto& [ctx, c] : {std::pair{&one, &a}, std::pair{&two, &b}}) {
    rms_norm_fwd(*ctx, c->op());
    rms_norm_bwd(*ctx, c->op(), c->grad());
  }
  for (const auto member : {&Case::y, &Case::dresidual, &Case::dx, &Case::dweight})
    EXPECT_TRUE(bitwise_equal(a.*member, b.*member));
}

void check_no_tokens(Context& ctx) {
  Case none(DType::f32, DType::f32, 0, 9, 4);
  const std::vector<double> before = none.dweight.to_double();
  rms_norm_fwd(ctx, none.op());
  rms_norm_bwd(ctx, none.op(), none.grad());
  EXPECT_EQ(none.dweight.to_double(), before);
}

TEST(RmsNorm, SameBitsForAnyThreadsAndNoTokens) {
  Context reference(reference_engine(), 1), one(cpu_engine(), 1), two(cpu_engine(), 2);
  check_same_bits(one, two, 300, 130);
  check_no_tokens(reference);
  check_no_tokens(two);
}

TEST(RmsNormCuda, SameBitsTwiceAndNoTokens) {
  on_cuda([](Context& ctx) {
    for (int64_t d_model : {130, 128, 1280}) check_same_bits(ctx, ctx, 300, d_model);
    check_no_tokens(ctx);
  });
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
  op = c.op();
  op.x = {Tensor(), c.x};  // which nobody would add
  EXPECT_THROW(rms_norm_fwd(ctx, op), CheckFailure);
  EXPECT_THROW(rms_norm_bwd(ctx, op, c.grad()), CheckFailure);
}

}  // namespace
}  // namespace krait::op_test
