#include "ops/linear.h"

#include <span>

#include "ops/linear_matvec.h"
#include "ops/onednn.h"
#include "ops/op_test.h"

namespace krait::op_test {
namespace {

// An implementation, and the error that its engine is allowed in a forward pass in f32.
struct Passes {
  void (*fwd)(Context&, const Linear&);
  void (*bwd)(Context&, const Linear&, const LinearGrad&);
  double tolerance;
};
const Passes kCpu = {cpu::linear_fwd, cpu::linear_bwd, 1e-6};
const Passes kMatvec = {cpu::linear_fwd_matvec, cpu::linear_bwd, 1e-6};
Passes cuda_passes(Context& ctx) {
  return {ctx.engine().linear_fwd, ctx.engine().linear_bwd, 3e-6};
}

struct Shape {
  int64_t tokens, in, out;
};

// Few and many rows, widths about the lanes of every target and beyond a panel of the widening.
const Shape kShapes[] = {{1, 1, 1},    {2, 2, 3},   {1, 15, 4},  {3, 16, 5},   {4, 17, 7},
                         {5, 31, 16},  {8, 32, 9},  {9, 33, 80}, {17, 48, 33}, {1, 257, 6},
                         {64, 65, 65}, {130, 8, 1}, {7, 4099, 5}};

// Widths that are aligned for vector and matrix instructions, and that nearly are.
const Shape kAlignedShapes[] = {{1, 64, 64},    {2, 768, 80},    {4, 40, 136},
                                {64, 64, 64},   {200, 48, 128},  {128, 36, 128},
                                {1000, 80, 48}, {300, 256, 200}, {6, 1056, 80}};

enum class Rows { strided, dense };

// All tensors of one call, by default with strided rows where strides are allowed.
struct Case {
  Case(DType dtype, DType y_dtype, const Shape& s, uint64_t seed, Rows rows = Rows::strided)
      : Case(dtype, y_dtype, s, seed, rows == Rows::strided ? 1 : 0) {}
  Case(DType dtype, DType y_dtype, const Shape& s, uint64_t seed, int64_t gap)
      : x(dtype, {s.tokens, s.in}, s.in + 3 * gap),
        weight(dtype, {s.out, s.in}),
        bias(full_precision_of(dtype), {s.out}),
        y(y_dtype, {s.tokens, s.out}, s.out + 5 * gap),
        dy(dtype, {s.tokens, s.out}, s.out + gap),
        dx(dtype, {s.tokens, s.in}, s.in + 2 * gap),
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

void expect_like_reference(Context& ctx, const Passes& passes, const Case& c, const Shape& s) {
  Case oracle(c, s);
  reference::linear_fwd(ctx, oracle.op());
  reference::linear_bwd(ctx, oracle.op(), oracle.grad());
  passes.fwd(ctx, c.op());
  passes.bwd(ctx, c.op(), c.grad());
  EXPECT_TRUE(close_as(c.y, oracle.y, passes.tolerance));
  EXPECT_TRUE(close_as(c.dx, oracle.dx, 1e-5));
  EXPECT_TRUE(close_as(c.dweight, oracle.dweight, 1e-5));
  EXPECT_TRUE(close_as(c.dbias, oracle.dbias, 1e-5));
  EXPECT_TRUE(c.guards_intact());
}

// Without a bias, dx added to, and dweight written over what is no number.
void expect_sums_like_reference(Context& ctx, const Passes& passes, Case& c, const Shape& s) {
  Rng rng(17);
  c.dx.normal(rng, 3);
  c.dweight.values(std::vector<double>(static_cast<size_t>(s.in * s.out), std::nan("")));
  Case oracle(c, s);
  oracle.dx.copy(c.dx);
  for (const auto& [run, k] :
       {std::pair{&passes, &c}, std::pair<const Passes*, Case*>{nullptr, &oracle}}) {
    Linear op = k->op();
    op.bias = {};
    LinearGrad grad = k->grad();
    grad.add_dx = true;
    grad.add_dweight = false;
    (run ? run->fwd : reference::linear_fwd)(ctx, op);
    (run ? run->bwd : reference::linear_bwd)(ctx, op, grad);
  }
  EXPECT_TRUE(close_as(c.y, oracle.y, passes.tolerance));
  EXPECT_TRUE(close_as(c.dx, oracle.dx, 1e-5));
  EXPECT_TRUE(close_as(c.dweight, oracle.dweight, 1e-5));
  EXPECT_TRUE(c.guards_intact());
}

constexpr std::pair<DType, DType> kTypes[] = {
    {DType::f32, DType::f32}, {DType::bf16, DType::bf16}, {DType::bf16, DType::f32}};

void check_against_reference(Context& ctx, const Passes& passes, std::span<const Shape> shapes,
                             Rows rows) {
  for (const Shape& s : shapes)
    for (const auto& [dtype, y_dtype] : kTypes) {
      SCOPED_TRACE(testing::Message() << s.tokens << " x " << s.in << " x " << s.out << " "
                                      << name_of(dtype) << " " << name_of(y_dtype));
      Case c(dtype, y_dtype, s, 11, rows);
      expect_like_reference(ctx, passes, c, s);
      Case sums(dtype, y_dtype, s, 12, rows);
      expect_sums_like_reference(ctx, passes, sums, s);
    }
}

TEST(Linear, CpuMatchesReference) {
  Context ctx(reference_engine(), 2);
  for_each_simd_target([&] {
    for (const Passes& passes : {kCpu, kMatvec})
      check_against_reference(ctx, passes, kShapes, Rows::strided);
  });
}

TEST(LinearCuda, MatchesReference) {
  on_cuda([](Context& ctx) {
    for (bool batch_invariant : {false, true}) {
      ctx.batch_invariant = batch_invariant;
      check_against_reference(ctx, cuda_passes(ctx), kShapes, Rows::strided);
      check_against_reference(ctx, cuda_passes(ctx), kAlignedShapes, Rows::dense);
    }
  });
}

TEST(Linear, WideningMatchesReference) {
  Context ctx(reference_engine(), 2);
  cpu::force_widening(true);
  check_against_reference(ctx, kCpu, kShapes, Rows::strided);
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

void expect_optional_arguments(Context& ctx, const Passes& passes) {
  Case c(DType::f32, DType::f32, {6, 9, 4}, 2);
  const std::vector<double> dbias = c.dbias.to_double();
  LinearGrad grad = c.grad();
  grad.dx = grad.dbias = {};
  passes.bwd(ctx, c.op(), grad);
  EXPECT_EQ(c.dbias.to_double(), dbias);
  EXPECT_TRUE(std::isnan(c.dx.to_double()[0]));
  Case none(DType::f32, DType::f32, {0, 9, 4}, 2);
  const std::vector<double> before = none.dweight.to_double();
  passes.fwd(ctx, none.op());
  passes.bwd(ctx, none.op(), none.grad());
  EXPECT_EQ(none.dweight.to_double(), before);
  LinearGrad written = none.grad();
  written.add_dweight = false;
  linear_bwd(ctx, none.op(), written);
  EXPECT_EQ(none.dweight.to_double(), std::vector<double>(before.size()));
}

TEST(Linear, OptionalGradientsAndNoTokens) {
  Context ctx(reference_engine(), 2);
  for (const Passes& passes : {kCpu, Passes{linear_fwd, linear_bwd, 0}})
    expect_optional_arguments(ctx, passes);
}

TEST(LinearCuda, OptionalGradientsAndNoTokens) {
  on_cuda([](Context& ctx) { expect_optional_arguments(ctx, cuda_passes(ctx)); });
}

// The first context's run against two runs in the second.
void expect_same_bits(Context& one, Context& two, const Passes& passes) {
  for (const Shape& s : {Shape{3, 100, 50}, Shape{40, 130, 70}, Shape{200, 304, 264}})
    for (DType dtype : {DType::f32, DType::bf16}) {
      Case a(dtype, dtype, s, 4), b(dtype, dtype, s, 4), c(dtype, dtype, s, 4);
      for (const auto& [ctx, k] : {std::pair{&one, &a}, std::pair{&two, &b}, std::pair{&two, &c}}) {
        passes.fwd(*ctx, k->op());
        passes.bwd(*ctx, k->op(), k->grad());
      }
      for (const auto member : {&Case::y, &Case::dx, &Case::dweight, &Case::dbias}) {
        EXPECT_TRUE(bitwise_equal(b.*member, c.*member)) << "two runs";
        EXPECT_TRUE(bitwise_equal(a.*member, b.*member)) << "two contexts";
      }
    }
}

TEST(Linear, SameBitsTwiceAndForAnyThreads) {
  Context one(reference_engine(), 1), two(reference_engine(), 2);
  expect_same_bits(one, two, kCpu);
}

// Sums over many tokens are shared by several blocks.
TEST(LinearCuda, SameBitsTwice) {
  on_cuda([](Context& ctx) {
    const Passes passes = cuda_passes(ctx);
    expect_same_bits(ctx, ctx, passes);
    const Shape s = {20000, 64, 48};
    Case first(DType::bf16, DType::bf16, s, 4, Rows::dense);
    passes.bwd(ctx, first.op(), first.grad());
    for (int i = 0; i < 5; ++i) {
      Case again(DType::bf16, DType::bf16, s, 4, Rows::dense);
      passes.bwd(ctx, again.op(), again.grad());
      EXPECT_TRUE(bitwise_equal(first.dweight, again.dweight));
      EXPECT_TRUE(bitwise_equal(first.dbias, again.dbias));
    }
  });
}

// Long sums in f32, and more rows than the GPU's blocks take at once.
TEST(LinearCuda, ManyTokens) {
  on_cuda([](Context& ctx) {
    const Passes passes = cuda_passes(ctx);
    const Shape s = {30000, 80, 96};
    for (DType dtype : {DType::f32, DType::bf16}) {
      Case c(dtype, DType::f32, s, 5, Rows::dense);
      expect_like_reference(ctx, passes, c, s);
    }
  });
}

// x and dx are slices of wider rows, at every alignment.
TEST(LinearCuda, SlicesOfRows) {
  on_cuda([](Context& ctx) {
    const Passes passes = cuda_passes(ctx);
    const Shape s = {70, 48, 96};
    for (int64_t offset : {0, 1, 8, 32}) {
      Case c(DType::bf16, DType::bf16, s, 6, Rows::dense);
      TestTensor wide(DType::bf16, {s.tokens, 80}), wide_dx(DType::bf16, {s.tokens, 80});
      wide.zero();
      wide_dx.zero();
      Rng rng(2);
      wide.normal(rng);
      Linear op = c.op();
      LinearGrad grad = c.grad();
      op.x = wide.view().slice(1, offset, offset + s.in);
      grad.dx = wide_dx.view().slice(1, offset, offset + s.in);
      c.x.copy(op.x);
      Case oracle(c, s);
      reference::linear_fwd(ctx, oracle.op());
      reference::linear_bwd(ctx, oracle.op(), oracle.grad());
      passes.fwd(ctx, op);
      passes.bwd(ctx, op, grad);
      EXPECT_TRUE(close_as(c.y, oracle.y, 1e-6));
      EXPECT_TRUE(close_bf16(grad.dx, oracle.dx.to_double(), 1e-5));
      EXPECT_TRUE(close_as(c.dweight, oracle.dweight, 1e-5));
      EXPECT_EQ(to_double(wide_dx.view().slice(1, offset + s.in, 80)),
                std::vector<double>(static_cast<size_t>(s.tokens * (32 - offset)), 0));
    }
  });
}

// One row of dy stands for all.
TEST(LinearCuda, RepeatedRows) {
  on_cuda([](Context& ctx) {
    Case c(DType::f32, DType::f32, {40, 9, 7}, 6), oracle(c, {40, 9, 7});
    LinearGrad grad = c.grad(), expected = oracle.grad();
    grad.dy.stride[0] = expected.dy.stride[0] = 0;
    cuda_passes(ctx).bwd(ctx, c.op(), grad);
    reference::linear_bwd(ctx, oracle.op(), expected);
    EXPECT_TRUE(close_as(c.dx, oracle.dx, 1e-5));
    EXPECT_TRUE(close_as(c.dweight, oracle.dweight, 1e-5));
    EXPECT_TRUE(close_as(c.dbias, oracle.dbias, 1e-5));
  });
}

void expect_batch_invariant(Context& ctx, const Passes& passes, const Shape& s,
                            std::initializer_list<int64_t> sizes, Rows rows = Rows::strided) {
  for (const auto& [dtype, y_dtype] : kTypes) {
    Case whole(dtype, y_dtype, s, 9, rows);
    passes.fwd(ctx, whole.op());
    for (int64_t size : sizes) {
      TestTensor y(y_dtype, {s.tokens, s.out});
      for (int64_t begin = 0; begin < s.tokens; begin += size) {
        Linear part = whole.op();
        const int64_t end = std::min(s.tokens, begin + size);
        part.x = whole.x.view().slice(0, begin, end);
        part.y = y.view().slice(0, begin, end);
        passes.fwd(ctx, part);
      }
      EXPECT_TRUE(bitwise_equal(y, whole.y)) << "in parts of " << size;
    }
  }
}

TEST(Linear, BatchInvariant) {
  Context ctx(reference_engine(), 2);
  ctx.batch_invariant = true;
  for_each_simd_target([&] {
    expect_batch_invariant(ctx, kCpu, {77, 203, 41}, {1, 2, 3, 5, 7, 64});
  });
}

TEST(LinearCuda, BatchInvariant) {
  on_cuda([](Context& ctx) {
    ctx.batch_invariant = true;
    for (const Shape& s : {Shape{77, 203, 41}, Shape{130, 768, 200}})
      expect_batch_invariant(ctx, cuda_passes(ctx), s, {1, 2, 3, 5, 7, 64});
    // On 132 multiprocessors tiles of all sizes, every edge within one, more steps than stages.
    expect_batch_invariant(ctx, cuda_passes(ctx), {3001, 520, 2204}, {1, 17, 100, 300, 600, 1000},
                           Rows::dense);
  });
}

// By Hopper's tensor cores, against cuBLASLt: several tiles each way, ends within one, an order of
// blocks that is not whole.
TEST(LinearCuda, TilesAreTheSameProducts) {
  on_cuda([](Context& ctx) {
    for (const Shape& s : {Shape{3001, 136, 2204}, Shape{4100, 2048, 1032}, Shape{100, 4096, 130}})
      for (const DType y_dtype : {DType::bf16, DType::f32}) {
        Case by_tiles(DType::bf16, y_dtype, s, 3, Rows::dense),
            other(DType::bf16, DType::f32, s, 3, Rows::dense);
        ctx.batch_invariant = true;
        cuda_passes(ctx).fwd(ctx, by_tiles.op());
        ctx.batch_invariant = false;
        cuda_passes(ctx).fwd(ctx, other.op());
        const std::vector<double> expected = other.y.to_double();
        if (y_dtype == DType::bf16)
          EXPECT_TRUE(close_bf16(by_tiles.y, expected, 1e-5)) << s.tokens;
        else
          EXPECT_TRUE(close(by_tiles.y, expected, 1e-5)) << s.tokens;
        EXPECT_TRUE(by_tiles.y.guards_intact());
      }
  });
}

// Prepared once, outside of the recording.
TEST(LinearCuda, RecordsAndReplays) {
  on_cuda([](Context& ctx) {
    const Passes passes = cuda_passes(ctx);
    const Shape s = {300, 64, 48};
    Case direct(DType::bf16, DType::bf16, s, 4), replayed(DType::bf16, DType::bf16, s, 4);
    const auto run = [&](const Case& c) {
      passes.fwd(ctx, c.op());
      passes.bwd(ctx, c.op(), c.grad());
    };
    run(direct);
    const auto recording = ctx.engine().record(ctx, [&] { run(replayed); });
    ctx.engine().replay(ctx, recording);
    for (const auto member : {&Case::y, &Case::dx, &Case::dweight, &Case::dbias})
      EXPECT_TRUE(bitwise_equal(direct.*member, replayed.*member));
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
