#include "ops/linear.h"

#include "ops/linear_matvec.h"
#include "ops/onednn.h"
#include "ops/op_test.h"

namespace krait::op_test {
namespace {

using Pass = void (*)(Context&, const Linear&);

struct Shape {
  int64_t tokens, in, out;
};

// Few and many rows, widths about the lanes of every target and beyond a panel of the widening.
const Shape kShapes[] = {{1, 1, 1},    {2, 2, 3},   {1, 15, 4},  {3, 16, 5},   {4, 17, 7},
                         {5, 31, 16},  {8, 32, 9},  {9, 33, 80}, {17, 48, 33}, {1, 257, 6},
                         {64, 65, 65}, {130, 8, 1}, {7, 4099, 5}};

// All tensors of one call, strided rows where strides are allowed.
struct Case {
  Case(DType dtype, DType y_dtype, const Shape& s, uint64_t seed)
      : x(dtype, {s.tokens, s.in}, s.in + 3),
        weight(dtype, {s.out, s.in}),
        bias(full_precision_of(dtype), {s.out}),
        y(y_dtype, {s.tokens, s.out}, s.out + 5),
        dy(dtype, {s.tokens, s.out}, s.out + 1),
        dx(dtype, {s.tokens, s.in}, s.in + 2),
        dweight(full_precision_of(dtype), {s.out, s.in}),
        dbias(full_precision_of(dtype), {s.out}) {
    Rng rng(seed);
    for (TestTensor* t : {&x, &weight, &bias, &dy, &dweight, &dbias}) t->normal(rng);
  }
  // The same (rounded) inputs in double.
  Case(const Case& o, const Shape& s) : Case(DType::f64, DType::f64, s, 1) {
    x.copy(o.x);
    weight.copy(o.weight);
    bias.copy(o.bias);
    dy.copy(o.dy);
    dweight.copy(o.dweight);
    dbias.copy(o.dbias);
  }
  static DType full_precision_of(DType t) { return t == DType::f64 ? t : DType::f32; }

  Linear op() const { return {.x = x, .weight = weight, .bias = bias, .y = y}; }
  LinearGrad grad() const { return {.dy = dy, .dx = dx, .dweight = dweight, .dbias = dbias}; }
  bool guards_intact() const {
    return y.guards_intact() && dx.guards_intact() && dweight.guards_intact() &&
           dbias.guards_intact();
  }

  TestTensor x, weight, bias, y, dy, dx, dweight, dbias;
};

::testing::AssertionResult close_as(const TestTensor& actual, const TestTensor& oracle,
                                    double tolerance) {
  if (actual.view().dtype == DType::bf16) return close_bf16(actual, oracle.to_double(), tolerance);
  return close(actual, oracle.to_double(), tolerance);
}

TEST(Linear, ReferenceGradientsMatchDifferences) {
  Context ctx(reference_engine(), 1);
  const Shape shape = {3, 5, 4};
  Case c(DType::f64, DType::f64, shape, 7);
  TestTensor x(DType::f64, {3, 5});  // contiguous, as the differences need it
  x.copy(c.x);
  c.dweight.zero();
  c.dbias.zero();
  Linear op = c.op();
  op.x = x;
  reference::linear_bwd(ctx, op, c.grad());
  const auto objective = [&] {
    reference::linear_fwd(ctx, op);
    const std::vector<double> y = c.y.to_double(), dy = c.dy.to_double();
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
    return sum;
  };
  Rng rng(3);
  EXPECT_TRUE(gradient_matches(x, c.dx.to_double(), objective, rng));
  EXPECT_TRUE(gradient_matches(c.weight, c.dweight.to_double(), objective, rng));
  EXPECT_TRUE(gradient_matches(c.bias, c.dbias.to_double(), objective, rng));
}

void check_against_reference(DType dtype, DType y_dtype, Pass forward) {
  Context ctx(reference_engine(), 2);
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(testing::Message() << s.tokens << " x " << s.in << " x " << s.out << " "
                                    << name_of(dtype) << " " << name_of(y_dtype));
    Case c(dtype, y_dtype, s, 11), oracle(c, s);
    reference::linear_fwd(ctx, oracle.op());
    reference::linear_bwd(ctx, oracle.op(), oracle.grad());
    forward(ctx, c.op());
    cpu::linear_bwd(ctx, c.op(), c.grad());
    EXPECT_TRUE(close_as(c.y, oracle.y, 1e-6));
    EXPECT_TRUE(close_as(c.dx, oracle.dx, 1e-5));
    EXPECT_TRUE(close_as(c.dweight, oracle.dweight, 1e-5));
    EXPECT_TRUE(close_as(c.dbias, oracle.dbias, 1e-5));
    EXPECT_TRUE(c.guards_intact());
  }
}

TEST(Linear, CpuMatchesReference) {
  for_each_simd_target([] {
    for (Pass forward : {cpu::linear_fwd, cpu::linear_fwd_matvec}) {
      check_against_reference(DType::f32, DType::f32, forward);
      check_against_reference(DType::bf16, DType::bf16, forward);
      check_against_reference(DType::bf16, DType::f32, forward);
    }
  });
}

TEST(Linear, WideningMatchesReference) {
  cpu::force_widening(true);
  check_against_reference(DType::bf16, DType::bf16, cpu::linear_fwd);
  check_against_reference(DType::bf16, DType::f32, cpu::linear_fwd);
  cpu::force_widening(false);
}

// More than one panel of the widening in every direction.
TEST(Linear, WideningInSeveralPanels) {
  cpu::force_widening(true);
  Context ctx(reference_engine(), 2);
  const Shape s = {1030, 2050, 1029};
  Case c(DType::bf16, DType::bf16, s, 5);
  TestTensor narrow_y(DType::bf16, {s.tokens, s.out}), one_by_one(DType::bf16, {s.tokens, s.out});
  Linear op = c.op();
  op.y = narrow_y;
  cpu::linear_fwd(ctx, op);
  cpu::force_widening(false);
  op.y = one_by_one;
  cpu::linear_fwd_matvec(ctx, op);
  EXPECT_LE(relative_rms(narrow_y.to_double(), one_by_one.to_double()), 2e-4);
}

TEST(Linear, OptionalGradientsAndNoTokens) {
  Context ctx(reference_engine(), 2);
  Case c(DType::f32, DType::f32, {6, 9, 4}, 2);
  const std::vector<double> dbias = c.dbias.to_double();
  LinearGrad grad = c.grad();
  grad.dx = grad.dbias = {};
  cpu::linear_bwd(ctx, c.op(), grad);
  EXPECT_EQ(c.dbias.to_double(), dbias);
  EXPECT_TRUE(std::isnan(c.dx.to_double()[0]));
  Case none(DType::f32, DType::f32, {0, 9, 4}, 2);
  const std::vector<double> before = none.dweight.to_double();
  linear_fwd(ctx, none.op());
  cpu::linear_fwd(ctx, none.op());
  cpu::linear_bwd(ctx, none.op(), none.grad());
  EXPECT_EQ(none.dweight.to_double(), before);
}

TEST(Linear, SameBitsTwiceAndForAnyThreads) {
  Context one(reference_engine(), 1), two(reference_engine(), 2);
  for (const Shape& s : {Shape{3, 100, 50}, Shape{40, 130, 70}, Shape{200, 300, 260}})
    for (DType dtype : {DType::f32, DType::bf16}) {
      Case a(dtype, dtype, s, 4), b(dtype, dtype, s, 4), c(dtype, dtype, s, 4);
      for (const auto& [ctx, k] : {std::pair{&one, &a}, std::pair{&two, &b}, std::pair{&two, &c}}) {
        cpu::linear_fwd(*ctx, k->op());
        cpu::linear_bwd(*ctx, k->op(), k->grad());
      }
      for (const auto member : {&Case::y, &Case::dx, &Case::dweight, &Case::dbias}) {
        EXPECT_TRUE(bitwise_equal(b.*member, c.*member)) << "two runs";
        EXPECT_TRUE(bitwise_equal(a.*member, b.*member)) << "one and two threads";
      }
    }
}

TEST(Linear, BatchInvariant) {
  Context ctx(reference_engine(), 2);
  ctx.batch_invariant = true;
  const Shape s = {77, 203, 41};
  for_each_simd_target([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      Case whole(dtype, DType::f32, s, 9);
      cpu::linear_fwd(ctx, whole.op());
      for (int64_t size : {1, 2, 3, 5, 7, 64}) {
        TestTensor y(DType::f32, {s.tokens, s.out});
        for (int64_t begin = 0; begin < s.tokens; begin += size) {
          Linear part = whole.op();
          const int64_t end = std::min(s.tokens, begin + size);
          part.x = whole.x.view().slice(0, begin, end);
          part.y = y.view().slice(0, begin, end);
          cpu::linear_fwd(ctx, part);
        }
        EXPECT_TRUE(bitwise_equal(y, whole.y)) << "in parts of " << size;
      }
    }
  });
}

TEST(Linear, SteadyStateTakesNoWorkspace) {
  Context ctx(reference_engine(), 2);
  Case c(DType::bf16, DType::bf16, {40, 64, 48}, 1);
  const auto step = [&] {
    cpu::linear_fwd(ctx, c.op());
    cpu::linear_bwd(ctx, c.op(), c.grad());
  };
  const auto position = [&] {
    const Arena::Scope scope(ctx.workspace());
    return ctx.workspace().allocate(1);
  };
  step();
  const int64_t before = ctx.workspace().block_allocations();
  const void* top = position();
  for (int i = 0; i < 3; ++i) step();
  EXPECT_EQ(ctx.workspace().block_allocations(), before);
  EXPECT_EQ(position(), top) << "workspace not given back";
}

TEST(Linear, PrimitiveCacheForgetsTheOldest) {
  Context ctx(reference_engine(), 1);
  const Shape largest = {300, 4, 3};
  Case c(DType::f32, DType::f32, largest, 1), oracle(c, largest);
  reference::linear_fwd(ctx, oracle.op());
  for (int round = 0; round < 2; ++round)
    for (int64_t tokens = 6; tokens <= largest.tokens; ++tokens) {
      Linear op = c.op();
      op.x = c.x.view().slice(0, 0, tokens);
      op.y = c.y.view().slice(0, 0, tokens);
      cpu::linear_fwd(ctx, op);
    }
  EXPECT_TRUE(close(c.y, oracle.y.to_double(), 1e-6));
}

TEST(Linear, EntryRefusesWrongArguments) {
  Context ctx(reference_engine(), 1);
  Case c(DType::bf16, DType::f32, {2, 3, 4}, 1);
  linear_fwd(ctx, c.op());
  linear_bwd(ctx, c.op(), c.grad());
  Linear op = c.op();
  op.weight = TestTensor(DType::f32, {4, 3});
  EXPECT_THROW(linear_fwd(ctx, op), CheckFailure);
  op = c.op();
  op.bias = c.dbias.view().slice(0, 0, 3);
  EXPECT_THROW(linear_fwd(ctx, op), CheckFailure);
  op = c.op();
  op.x = op.x.slice(1, 0, 2);
  EXPECT_THROW(linear_fwd(ctx, op), CheckFailure);
  LinearGrad grad = c.grad();
  grad.dx = grad.dx.slice(0, 0, 1);
  EXPECT_THROW(linear_bwd(ctx, c.op(), grad), CheckFailure);
}

}  // namespace
}  // namespace krait::op_test
