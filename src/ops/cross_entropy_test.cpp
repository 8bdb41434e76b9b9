#include "ops/cross_entropy.h"

#include <cmath>

#include "ops/onednn.h"
#include "ops/op_test.h"

namespace krait::op_test {
namespace {

// An implementation, and the error that its engine is allowed in the loss.
struct Passes {
  void (*fwd)(Context&, const CrossEntropy&);
  void (*bwd)(Context&, const CrossEntropy&, const CrossEntropyGrad&);
  double tolerance;
};
const Passes kCpu = {cpu::cross_entropy_fwd, cpu::cross_entropy_bwd, 1e-6};
Passes cuda_passes(Context& ctx) {
  return {ctx.engine().cross_entropy_fwd, ctx.engine().cross_entropy_bwd, 3e-6};
}

struct Shape {
  int64_t tokens, d_model, vocab_size;
};

const Shape kShapes[] = {{1, 1, 1},   {2, 3, 2},     {3, 8, 15},     {5, 16, 16},    {9, 33, 17},
                         {40, 5, 33}, {7, 20, 4100}, {1100, 4, 257}, {130, 2, 70001}};

struct Case {
  Case(DType dtype, const Shape& s, uint64_t seed)
      : x(dtype, {s.tokens, s.d_model}, s.d_model + 3),
        weight(dtype, {s.vocab_size, s.d_model}),
        targets(DType::i32, {s.tokens}),
        loss(full(dtype), {s.tokens}),
        dx(dtype, {s.tokens, s.d_model}, s.d_model + 1),
        dweight(full(dtype), {s.vocab_size, s.d_model}) {
    Rng rng(seed);
    x.normal(rng, 2);
    weight.normal(rng);
    dweight.normal(rng, 0.01);
    std::vector<double> ids;
    for (int64_t t = 0; t < s.tokens; ++t)
      ids.push_back(t % 4 == 3
                        ? -100.0
                        : static_cast<double>(rng.below(static_cast<uint64_t>(s.vocab_size))));
    targets.values(ids);
  }
  Case(const Case& o, const Shape& s) : Case(DType::f64, s, 1) {
    x.copy(o.x);
    weight.copy(o.weight);
    targets.copy(o.targets);
    dweight.copy(o.dweight);
  }
  static DType full(DType t) { return t == DType::f64 ? t : DType::f32; }

  CrossEntropy op() const { return {.x = x, .weight = weight, .targets = targets, .loss = loss}; }
  CrossEntropyGrad grad() const { return {.scale = 0.37f, .dx = dx, .dweight = dweight}; }
  bool guards_intact() const {
    return loss.guards_intact() && dx.guards_intact() && dweight.guards_intact();
  }

  TestTensor x, weight, targets, loss, dx, dweight;
};

TEST(CrossEntropy, ReferenceGradientsMatchDifferences) {
  Context ctx(reference_engine(), 1);
  Case c(DType::f64, {5, 4, 6}, 3);
  TestTensor x(DType::f64, {5, 4});
  x.copy(c.x);
  c.dweight.zero();
  CrossEntropy op = c.op();
  op.x = x;
  cross_entropy_bwd(ctx, op, c.grad());
  const auto objective = [&] {
    cross_entropy_fwd(ctx, op);
    double sum = 0;
    for (double loss : c.loss.to_double()) sum += loss;
    return sum * static_cast<double>(0.37f);
  };
  Rng rng(8);
  EXPECT_TRUE(gradient_matches(x, c.dx.to_double(), objective, rng));
  EXPECT_TRUE(gradient_matches(c.weight, c.dweight.to_double(), objective, rng));
}

TEST(CrossEntropy, UniformLogitsGiveLogVocabSize) {
  Context ctx(reference_engine(), 1);
  Case c(DType::f64, {3, 4, 50}, 3);
  c.weight.zero();
  cross_entropy_fwd(ctx, c.op());
  EXPECT_NEAR(c.loss.to_double()[0], std::log(50.0), 1e-14);
}

void check_against_reference(Context& ctx, const Passes& passes, DType dtype, const Shape& s) {
  SCOPED_TRACE(testing::Message() << s.tokens << " x " << s.d_model << " x " << s.vocab_size << " "
                                  << name_of(dtype));
  Case c(dtype, s, 11), oracle(c, s);
  reference::cross_entropy_bwd(ctx, oracle.op(), oracle.grad());
  passes.fwd(ctx, c.op());
  EXPECT_TRUE(close(c.loss, oracle.loss.to_double(), passes.tolerance));
  c.loss.values(std::vector<double>(static_cast<size_t>(s.tokens), std::nan("")));
  const auto check_backward = [&](Case& k, const Tensor& dx) {
    CrossEntropyGrad grad = k.grad();
    grad.dx = dx;
    passes.bwd(ctx, k.op(), grad);
    EXPECT_TRUE(close(k.loss, oracle.loss.to_double(), passes.tolerance));
    if (dtype == DType::bf16) {
      EXPECT_TRUE(close_bf16(dx, oracle.dx.to_double()));
      EXPECT_TRUE(close(k.dweight, oracle.dweight.to_double(), 2 * 1.7e-3));  // dlogits are bf16
    } else {
      EXPECT_TRUE(close(dx, oracle.dx.to_double(), 1e-5));
      EXPECT_TRUE(close(k.dweight, oracle.dweight.to_double(), 1e-5));
    }
    EXPECT_TRUE(k.guards_intact() && k.x.guards_intact());
  };
  check_backward(c, c.dx);
  Case in_place(dtype, s, 11);
  check_backward(in_place, in_place.x);
}

TEST(CrossEntropy, CpuMatchesReference) {
  Context ctx(reference_engine(), 2);
  for_each_simd_target([&] {
    for (const Shape& s : kShapes)
      for (DType dtype : {DType::f32, DType::bf16}) check_against_reference(ctx, kCpu, dtype, s);
  });
}

// Vocabularies about the widths that a warp and the blocks take, and several chunks of tokens.
TEST(CrossEntropyCuda, MatchesReference) {
  on_cuda([](Context& ctx) {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (const Shape& s : kShapes) check_against_reference(ctx, cuda_passes(ctx), dtype, s);
      for (const Shape& s :
           {Shape{70, 64, 511}, Shape{300, 64, 1024}, Shape{100, 32, 1025}, Shape{50, 16, 8192},
            Shape{50, 16, 8193}, Shape{4, 8, 50280}, Shape{9, 8, 262144}})
        check_against_reference(ctx, cuda_passes(ctx), dtype, s);
    }
    check_against_reference(ctx, cuda_passes(ctx), DType::bf16, {3000, 2, 131071});
  });
}

TEST(CrossEntropy, WideningMatchesReference) {
  Context ctx(reference_engine(), 2);
  cpu::force_widening(true);
  for (const Shape& s : kShapes) check_against_reference(ctx, kCpu, DType::bf16, s);
  cpu::force_widening(false);
}

// A head in 8 bits: forward only.
void check_int8(Context& ctx, const Passes& passes, DType dtype, const Shape& s) {
  SCOPED_TRACE(testing::Message() << s.tokens << " x " << s.d_model << " x " << s.vocab_size << " "
                                  << name_of(dtype));
  const Case c(dtype, s, 11), oracle(c, s);
  TestTensor weight(DType::i8, {s.vocab_size, s.d_model}), scale(DType::f32, {s.vocab_size}),
      scale_in_double(DType::f64, {s.vocab_size});
  Rng rng(5);
  weight.uniform(rng, -127.99, 127.99);
  scale_in_double.copy(scale.uniform(rng, 0.005, 0.03));
  CrossEntropy op = c.op(), expected = oracle.op();
  op.weight = expected.weight = weight;
  op.weight_scale = scale;
  expected.weight_scale = scale_in_double;
  reference::cross_entropy_fwd(ctx, expected);
  passes.fwd(ctx, op);
  EXPECT_TRUE(close(c.loss, oracle.loss.to_double(), passes.tolerance));
  EXPECT_TRUE(c.guards_intact());
  EXPECT_THROW(cross_entropy_bwd(ctx, op, c.grad()), CheckFailure);
}

TEST(CrossEntropy, HeadInInt8) {
  Context ctx(reference_engine(), 2);
  for (const Shape& s : kShapes)
    for (DType dtype : {DType::f32, DType::bf16}) check_int8(ctx, kCpu, dtype, s);
}

TEST(CrossEntropyCuda, HeadInInt8) {
  on_cuda([](Context& ctx) {
    for (const Shape& s : kShapes)
      for (DType dtype : {DType::f32, DType::bf16}) check_int8(ctx, cuda_passes(ctx), dtype, s);
  });
}

void expect_nothing_from_ignored(Context& ctx, const Passes& passes) {
  for (DType dtype : {DType::f32, DType::bf16})
    for (int64_t vocab_size : {9, 9000}) {
      Case c(dtype, {20, 6, vocab_size}, 2);
      c.targets.values(std::vector<double>(20, -1));
      const std::vector<double> before = c.dweight.to_double();
      passes.bwd(ctx, c.op(), c.grad());
      EXPECT_EQ(c.loss.to_double(), std::vector<double>(20, 0));
      EXPECT_EQ(c.dx.to_double(), std::vector<double>(120, 0));
      EXPECT_EQ(c.dweight.to_double(), before);
    }
}

TEST(CrossEntropy, IgnoredTargetsGiveNothing) {
  Context ctx(reference_engine(), 2);
  for (const auto bwd : {reference::cross_entropy_bwd, cpu::cross_entropy_bwd})
    expect_nothing_from_ignored(ctx, {nullptr, bwd, 0});
}

TEST(CrossEntropyCuda, IgnoredTargetsGiveNothing) {
  on_cuda([](Context& ctx) { expect_nothing_from_ignored(ctx, cuda_passes(ctx)); });
}

// Logits so large that e^logit overflows, and losses of thousands.
void expect_finite(Context& ctx, const Passes& passes) {
  const Shape s = {20, 16, 300};
  Case c(DType::f32, s, 2), oracle(c, s);
  Rng rng(1);
  c.x.normal(rng, 300);
  oracle.x.copy(c.x);
  reference::cross_entropy_bwd(ctx, oracle.op(), oracle.grad());
  passes.bwd(ctx, c.op(), c.grad());
  EXPECT_TRUE(close(c.loss, oracle.loss.to_double(), passes.tolerance));
  EXPECT_TRUE(close(c.dx, oracle.dx.to_double(), 1e-4));  // p moves by the logit's rounding, 1e-4
}

TEST(CrossEntropy, LargeLogitsStayFinite) {
  Context ctx(reference_engine(), 2);
  expect_finite(ctx, kCpu);
}

TEST(CrossEntropyCuda, LargeLogitsStayFinite) {
  on_cuda([](Context& ctx) { expect_finite(ctx, cuda_passes(ctx)); });
}

void expect_optional_arguments(Context& ctx, const Passes& passes) {
  Case a(DType::f32, {20, 6, 9}, 2), b(DType::f32, {20, 6, 9}, 2);
  passes.bwd(ctx, a.op(), a.grad());
  CrossEntropyGrad grad = b.grad();
  grad.dweight = {};
  passes.bwd(ctx, b.op(), grad);
  EXPECT_TRUE(bitwise_equal(a.dx, b.dx));
  Case none(DType::f32, {0, 6, 9}, 2);
  const std::vector<double> before = none.dweight.to_double();
  passes.bwd(ctx, none.op(), none.grad());
  EXPECT_EQ(none.dweight.to_double(), before);
  grad = none.grad();
  grad.add_dweight = false;
  cross_entropy_bwd(ctx, none.op(), grad);
  EXPECT_EQ(none.dweight.to_double(), std::vector<double>(before.size()));
}

// Over what is no number, by all chunks of tokens together.
void expect_weight_gradient_written(Context& ctx, const Passes& passes, const Shape& s) {
  Case c(DType::f32, s, 12);
  c.dweight.values(
      std::vector<double>(static_cast<size_t>(s.d_model * s.vocab_size), std::nan("")));
  Case oracle(c, s);
  for (const auto& [bwd, k] :
       {std::pair{passes.bwd, &c}, {reference::cross_entropy_bwd, &oracle}}) {
    CrossEntropyGrad grad = k->grad();
    grad.add_dweight = false;
    bwd(ctx, k->op(), grad);
  }
  EXPECT_TRUE(close(c.dweight, oracle.dweight.to_double(), 1e-5));
  EXPECT_TRUE(c.guards_intact());
}

TEST(CrossEntropy, WeightGradientIsWritten) {
  Context ctx(reference_engine(), 2);
  expect_weight_gradient_written(ctx, kCpu, {700, 4, 2001});
}

TEST(CrossEntropyCuda, WeightGradientIsWritten) {
  on_cuda([](Context& ctx) {
    expect_weight_gradient_written(ctx, cuda_passes(ctx), {40, 16, 100});
    expect_weight_gradient_written(ctx, cuda_passes(ctx), {800, 4, 262144});  // two chunks
  });
}

TEST(CrossEntropy, NoWeightGradientAndNoTokens) {
  Context ctx(reference_engine(), 2);
  for (const auto bwd : {cross_entropy_bwd, cpu::cross_entropy_bwd})
    expect_optional_arguments(ctx, {nullptr, bwd, 0});
}

TEST(CrossEntropyCuda, NoWeightGradientAndNoTokens) {
  on_cuda([](Context& ctx) {
    for (const auto bwd : {cross_entropy_bwd, cuda_passes(ctx).bwd})
      expect_optional_arguments(ctx, {nullptr, bwd, 0});
  });
}

// The host cannot read the targets of a GPU: one beyond the vocabulary shows in its loss.
TEST(CrossEntropyCuda, TargetBeyondTheVocabularyGivesNoNumber) {
  on_cuda([](Context& ctx) {
    Case c(DType::f32, {3, 6, 9}, 2);
    c.targets.values({0, 9, 1});
    cross_entropy_fwd(ctx, c.op());
    const std::vector<double> loss = c.loss.to_double();
    EXPECT_TRUE(std::isfinite(loss[0]) && std::isnan(loss[1]) && std::isfinite(loss[2]));
    cross_entropy_bwd(ctx, c.op(), c.grad());
    EXPECT_TRUE(std::isnan(c.loss.to_double()[1]));
  });
}

// The first context's run against two runs in the second.
void expect_same_bits(Context& one, Context& two, const Passes& passes) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    const Shape s = {1200, 30, 130};
    Case a(dtype, s, 4), b(dtype, s, 4), c(dtype, s, 4);
    for (const auto& [ctx, k] : {std::pair{&one, &a}, std::pair{&two, &b}, std::pair{&two, &c}})
      passes.bwd(*ctx, k->op(), k->grad());
    for (const auto member : {&Case::loss, &Case::dx, &Case::dweight}) {
      EXPECT_TRUE(bitwise_equal(b.*member, c.*member));
      EXPECT_TRUE(bitwise_equal(a.*member, b.*member));
    }
  }
}

TEST(CrossEntropy, SameBitsTwiceAndForAnyThreads) {
  Context one(reference_engine(), 1), two(reference_engine(), 2);
  expect_same_bits(one, two, kCpu);
}

TEST(CrossEntropyCuda, SameBitsTwice) {
  on_cuda([](Context& ctx) { expect_same_bits(ctx, ctx, cuda_passes(ctx)); });
}

TEST(CrossEntropy, WorkspaceIsAChunkOfLogits) {
  Context ctx(reference_engine(), 2);
  Case c(DType::f32, {3000, 4, 20000}, 4);  // all logits would take 240 MB
  cpu::cross_entropy_bwd(ctx, c.op(), c.grad());
  EXPECT_LE(ctx.workspace().capacity(), size_t{40} << 20);
  const int64_t before = ctx.workspace().block_allocations();
  cpu::cross_entropy_bwd(ctx, c.op(), c.grad());
  EXPECT_EQ(ctx.workspace().block_allocations(), before);
}

TEST(CrossEntropy, EntryRefusesWrongArguments) {
  Context ctx(reference_engine(), 1);
  Case c(DType::f32, {2, 3, 4}, 1);
  cross_entropy_bwd(ctx, c.op(), c.grad());
  c.targets.values({0, 4});
  EXPECT_THROW(cross_entropy_fwd(ctx, c.op()), CheckFailure);
  EXPECT_THROW(cross_entropy_bwd(ctx, c.op(), c.grad()), CheckFailure);
  c.targets.values({0, -5});
  CrossEntropyGrad grad = c.grad();
  grad.dweight = grad.dweight.slice(0, 0, 3);
  EXPECT_THROW(cross_entropy_bwd(ctx, c.op(), grad), CheckFailure);
}

}  // namespace
}  // namespace krait::op_test
