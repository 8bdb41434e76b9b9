#include "ops/adamw.h"

#include <cmath>

#include "ops/op_test.h"

namespace krait::op_test {
namespace {

struct Case {
  Case(DType dtype, int64_t size, uint64_t seed)
      : param(dtype, {size}),
        grad(dtype, {size}),
        m(dtype, {size}),
        v(dtype, {size}),
        norm(dtype, {1}),
        rounded(DType::bf16, {size}) {
    Rng rng(seed);
    param.normal(rng);
    grad.normal(rng, 0.1);
    m.normal(rng, 0.05);
    v.uniform(rng, 0, 0.01);
    norm.values({2.5});
  }
  Case(const Case& o, int64_t size) : Case(DType::f64, size, 1) {
    param.copy(o.param);
    grad.copy(o.grad);
    m.copy(o.m);
    v.copy(o.v);
    norm.copy(o.norm);
  }
  AdamW op() const {
    return {.param = param,
            .grad = grad,
            .m = m,
            .v = v,
            .rounded = rounded,
            .norm = norm,
            .max_norm = 1,
            .lr = 0.01f,
            .weight_decay = 0.1f,
            .step = 3};
  }
  bool guards_intact() const {
    return param.guards_intact() && m.guards_intact() && v.guards_intact() &&
           rounded.guards_intact();
  }
  std::vector<double> rounded_param() const {
    std::vector<double> values = param.to_double();
    for (double& x : values) x = static_cast<float>(bf16(static_cast<float>(x)));
    return values;
  }

  TestTensor param, grad, m, v, norm, rounded;
};

// The equations of the header by hand: zero state, no clipping. At step 1 the corrected moments
// are g and g^2, so that the step is lr sign(g).
TEST(AdamW, FirstStepIsTheLearningRate) {
  Context ctx(reference_engine(), 1);
  Case c(DType::f64, 2, 1);
  c.param.values({2, -3});
  c.grad.values({0.5, -1e-3});
  c.m.zero();
  c.v.zero();
  AdamW op = c.op();
  op.norm = {};
  op.step = 1;
  adamw(ctx, op);
  const double decay = 1 - static_cast<double>(0.01f) * static_cast<double>(0.1f);
  EXPECT_NEAR(c.param.to_double()[0], 2 * decay - 0.01, 1e-8);
  EXPECT_NEAR(c.param.to_double()[1], -3 * decay + 0.01, 1e-6);  // eps beside |g| = 1e-3
  EXPECT_NEAR(c.m.to_double()[0], 0.05, 1e-7);
  EXPECT_NEAR(c.v.to_double()[0], 0.0125, 1e-7);
}

TEST(AdamW, ClippingScalesTheGradient) {
  Context ctx(reference_engine(), 1);
  Case clipped(DType::f64, 9, 2), scaled(DType::f64, 9, 2), small(DType::f64, 9, 2),
      plain(DType::f64, 9, 2);
  adamw(ctx, clipped.op());  // norm 2.5, max_norm 1
  std::vector<double> g = scaled.grad.to_double();
  for (double& x : g) x /= 2.5;
  scaled.grad.values(g);
  AdamW op = scaled.op();
  op.norm = {};
  adamw(ctx, op);
  EXPECT_TRUE(close(clipped.param, scaled.param.to_double(), 1e-7));
  small.norm.values({0.5});  // below max_norm: nothing is scaled up
  adamw(ctx, small.op());
  op = plain.op();
  op.norm = {};
  adamw(ctx, op);
  EXPECT_TRUE(bitwise_equal(small.param, plain.param));
}

void check_against_reference(Context& ctx, int64_t size) {
  for (int64_t step : {1, 3, 100000}) {
    SCOPED_TRACE(testing::Message() << size << " at step " << step);
    Context reference(reference_engine(), 1);
    Case c(DType::f32, size, 3), oracle(c, size);
    AdamW op = c.op(), oracle_op = oracle.op();
    op.step = oracle_op.step = step;
    adamw(ctx, op);
    adamw(reference, oracle_op);
    EXPECT_TRUE(close(c.param, oracle.param.to_double(), 1e-6));
    EXPECT_TRUE(close(c.m, oracle.m.to_double(), 1e-6));
    EXPECT_TRUE(close(c.v, oracle.v.to_double(), 1e-6));
    EXPECT_EQ(c.rounded.to_double(), c.rounded_param());
    EXPECT_EQ(oracle.rounded.to_double(), oracle.rounded_param());
    EXPECT_TRUE(c.guards_intact());
  }
}

TEST(AdamW, CpuMatchesReference) {
  for_each_simd_target([] {
    Context ctx(cpu_engine(), 2);
    for (int64_t size : {0, 1, 2, 3, 7, 8, 15, 16, 17, 33, 1000, 40000})
      check_against_reference(ctx, size);
  });
}

TEST(AdamWCuda, MatchesReference) {
  on_cuda([](Context& ctx) {
    for (int64_t size : {0, 1, 2, 3, 4, 5, 1023, 1024, 1025, 100003})
      check_against_reference(ctx, size);
  });
}

// Parts of a larger tensor begin anywhere: what is not aligned for 16-byte accesses gives the same.
TEST(AdamWCuda, AlignmentDoesNotMatter) {
  on_cuda([](Context& ctx) {
    Case whole(DType::f32, 1000, 3), part(DType::f32, 1000, 3);
    adamw(ctx, whole.op());
    for (auto [begin, end] : {std::pair{0, 1}, {1, 700}, {700, 1000}}) {
      AdamW op = part.op();
      for (Tensor* t : {&op.param, &op.grad, &op.m, &op.v, &op.rounded})
        *t = t->slice(0, begin, end);
      adamw(ctx, op);
    }
    EXPECT_TRUE(bitwise_equal(whole.param, part.param));
    EXPECT_TRUE(bitwise_equal(whole.rounded, part.rounded));
  });
}

// A step whose gradients have overflowed must not be applied, although no host has looked yet.
void check_norm_not_finite(Context& ctx, DType dtype) {
  for (double norm : {std::nan(""), HUGE_VAL}) {
    Case c(dtype, 37, 3), before(dtype, 37, 3);
    c.norm.values({norm});
    adamw(ctx, c.op());
    EXPECT_TRUE(bitwise_equal(c.param, before.param));
    EXPECT_TRUE(bitwise_equal(c.m, before.m));
    EXPECT_TRUE(bitwise_equal(c.v, before.v));
    for (const double x : c.rounded.to_double()) EXPECT_TRUE(std::isnan(x));
  }
}

TEST(AdamW, ChangesNothingWhenTheNormIsNotFinite) {
  Context reference(reference_engine(), 1), cpu(cpu_engine(), 2);
  check_norm_not_finite(reference, DType::f64);
  check_norm_not_finite(cpu, DType::f32);
}

TEST(AdamWCuda, ChangesNothingWhenTheNormIsNotFinite) {
  on_cuda([](Context& ctx) { check_norm_not_finite(ctx, DType::f32); });
}

TEST(AdamW, SameBitsForAnyThreads) {
  Context one(reference_engine(), 1), two(reference_engine(), 2);
  Case a(DType::f32, 100003, 3), b(DType::f32, 100003, 3);
  cpu::adamw(one, a.op());
  cpu::adamw(two, b.op());
  EXPECT_TRUE(bitwise_equal(a.param, b.param));
}

void check_norm(Context& one, Context& two) {
  Rng rng(1);
  std::vector<TestTensor> grads;
  for (int64_t size : {1, 5, 16384, 0, 16385, 50000}) {
    grads.emplace_back(DType::f32, std::initializer_list<int64_t>{size});
    grads.back().normal(rng, 0.01);
  }
  std::vector<Tensor> views(grads.begin(), grads.end());
  views.push_back(views.back().slice(0, 1, 5000));  // not aligned
  TestTensor norms(DType::f32, {3, 1});
  double sum = 0;
  for (const Tensor& g : views)
    for (double x : to_double(g)) sum += x * x;
  Context reference(reference_engine(), 1);
  const auto norm = [&](int64_t i) {
    return GlobalNorm{.grads = views, .norm = norms.view().slice(0, i, i + 1).reshape({1})};
  };
  global_norm(reference, norm(0));
  global_norm(one, norm(1));
  global_norm(two, norm(2));
  const std::vector<double> n = norms.to_double();
  EXPECT_NEAR(n[0], std::sqrt(sum), 1e-7 * std::sqrt(sum));
  EXPECT_NEAR(n[1], std::sqrt(sum), 1e-7 * std::sqrt(sum));
  EXPECT_EQ(n[1], n[2]);
  EXPECT_TRUE(norms.guards_intact());
}

TEST(GlobalNorm, CpuMatchesReferenceForAnyThreads) {
  for_each_simd_target([] {
    Context one(cpu_engine(), 1), two(cpu_engine(), 2);
    check_norm(one, two);
  });
}

TEST(GlobalNormCuda, MatchesReferenceTwice) {
  on_cuda([](Context& ctx) { check_norm(ctx, ctx); });
}

TEST(AdamW, EntryRefusesWrongArguments) {
  Context ctx(reference_engine(), 1);
  Case c(DType::f32, 4, 1);
  adamw(ctx, c.op());
  AdamW op = c.op();
  op.grad = op.grad.slice(0, 0, 3);
  EXPECT_THROW(adamw(ctx, op), CheckFailure);
  op = c.op();
  op.step = 0;
  EXPECT_THROW(adamw(ctx, op), CheckFailure);
  op = c.op();
  op.rounded = op.rounded.slice(0, 0, 3);
  EXPECT_THROW(adamw(ctx, op), CheckFailure);
}

}  // namespace
}  // namespace krait::op_test
