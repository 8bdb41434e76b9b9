// Linear with weights in 8 bits.
#include "ops/linear_int8.h"

#include <cmath>
#include <span>

#include "ops/linear_matvec.h"
#include "ops/onednn.h"
#include "ops/op_test.h"

namespace krait::op_test {
namespace {

using Forward = void (*)(Context&, const Linear&);

struct Shape {
  int64_t tokens, in, out;
};

// Few and many rows, widths about the lanes of every target.
const Shape kShapes[] = {{1, 1, 1},    {2, 2, 3},   {1, 15, 4},   {3, 16, 5},   {4, 17, 7},
                         {5, 31, 16},  {8, 32, 9},  {16, 33, 80}, {17, 48, 33}, {1, 257, 6},
                         {64, 65, 65}, {130, 8, 1}, {7, 4099, 5}, {33, 70, 520}};

// Widths that are aligned for vectors and for tiles of matrix instructions, or not quite, outputs
// that a GPU gives to blocks and to warps, and tokens about its tiles and the ways it has.
const Shape kAlignedShapes[] = {{1, 64, 64},     {1, 768, 80},    {1, 776, 2309},  {2, 64, 5},
                                {5, 2048, 30},   {9, 128, 40},    {16, 256, 2300}, {16, 72, 40},
                                {17, 40, 136},   {33, 768, 120},  {64, 64, 64},    {65, 192, 50},
                                {128, 64, 2309}, {128, 72, 2309}, {129, 64, 33},   {200, 48, 128},
                                {1000, 128, 48}, {300, 256, 200}};

struct Case {
  Case(DType dtype, DType y_dtype, const Shape& s, uint64_t seed, int64_t gap = 1)
      : x(dtype, {s.tokens, s.in}, s.in + 3 * gap),
        weight(DType::i8, {s.out, s.in}),
        weight_scale(full(dtype), {s.out}),
        bias(full(dtype), {s.out}),
        y(y_dtype, {s.tokens, s.out}, s.out + 5 * gap) {
    Rng rng(seed);
    x.normal(rng);
    weight.uniform(rng, -127.99, 127.99);
    weight_scale.uniform(rng, 0.001, 0.02);
    bias.normal(rng);
    if (s.out > 2) {  // a row of zeros, as quantization leaves it
      std::vector<double> scales = weight_scale.to_double();
      scales[1] = 0;
      weight_scale.values(scales);
    }
  }
  // The same (rounded) inputs in double.
  Case(const Case& o, const Shape& s) : Case(DType::f64, DType::f64, s, 1) {
    x.copy(o.x);
    weight.copy(o.weight);
    weight_scale.copy(o.weight_scale);
    bias.copy(o.bias);
  }
  static DType full(DType t) { return t == DType::f64 ? t : DType::f32; }

  Linear op(bool with_bias = true) const {
    return {.x = x,
            .weight = weight,
            .bias = with_bias ? bias : Tensor(),
            .y = y,
            .weight_scale = weight_scale};
  }

  TestTensor x, weight, weight_scale, bias, y;
};

constexpr std::pair<DType, DType> kTypes[] = {
    {DType::f32, DType::f32}, {DType::bf16, DType::bf16}, {DType::bf16, DType::f32}};

void check_against_reference(Context& ctx, std::initializer_list<Forward> implementations,
                             double tolerance, std::span<const Shape> shapes, int64_t gap = 1) {
  for (const Shape& s : shapes)
    for (const auto& [dtype, y_dtype] : kTypes) {
      SCOPED_TRACE(testing::Message() << s.tokens << " x " << s.in << " x " << s.out << " "
                                      << name_of(dtype) << " " << name_of(y_dtype));
      const bool with_bias = dtype == y_dtype || s.tokens % 2 == 0;
      Case c(dtype, y_dtype, s, 11, gap), oracle(c, s);
      reference::linear_fwd(ctx, oracle.op(with_bias));
      const std::vector<double> expected = oracle.y.to_double();
      for (const Forward fwd : implementations) {
        c.y.values(std::vector<double>(expected.size(), std::nan("")));
        fwd(ctx, c.op(with_bias));
        if (y_dtype == DType::bf16)
          EXPECT_TRUE(close_bf16(c.y, expected, tolerance));
        else
          EXPECT_TRUE(close(c.y, expected, tolerance));
        EXPECT_TRUE(c.y.guards_intact());
      }
    }
}

// The specification: a row of the matrix is its scale times its integers.
TEST(LinearInt8, ReferenceIsTheMatrixThatItStandsFor) {
  Context ctx(reference_engine(), 1);
  const Shape s = {3, 5, 4};
  const Case c(DType::f64, DType::f64, s, 7);
  const TestTensor weight(DType::f64, {s.out, s.in}), y(DType::f64, {s.tokens, s.out});
  for (int64_t o = 0; o < s.out; ++o)
    for (int64_t i = 0; i < s.in; ++i)
      weight.view().row<double>(o)[i] =
          c.weight_scale.view().ptr<double>()[o] * c.weight.view().row<int8_t>(o)[i];
  linear_fwd(ctx, c.op());
  linear_fwd(ctx, {.x = c.x, .weight = weight, .bias = c.bias, .y = y});
  EXPECT_TRUE(close(c.y, y.to_double(), 1e-15));
}

TEST(LinearInt8, CpuMatchesReference) {
  Context ctx(reference_engine(), 2);
  for_each_simd_target([&] {
    check_against_reference(ctx, {cpu::linear_fwd, cpu::linear_fwd_matvec, cpu::linear_fwd_int8},
                            1e-6, kShapes);
  });
  check_against_reference(ctx, {cpu::linear_fwd}, 1e-6, kAlignedShapes, 0);
  cpu::force_widening(true);
  check_against_reference(ctx, {cpu::linear_fwd}, 1e-6, kShapes);
  cpu::force_widening(false);
}

TEST(LinearInt8Cuda, MatchesReference) {
  on_cuda([](Context& ctx) {
    for (bool batch_invariant : {false, true}) {
      ctx.batch_invariant = batch_invariant;
      check_against_reference(ctx, {ctx.engine().linear_fwd}, 3e-6, kShapes);
      check_against_reference(ctx, {ctx.engine().linear_fwd}, 3e-6, kAlignedShapes, 0);
    }
  });
}

// Several pieces of the matrix and blocks of tokens, on both engines.
const Shape kLarge = {1030, 70, 1029};

TEST(LinearInt8, SeveralPieces) {
  Context ctx(reference_engine(), 2);
  check_against_reference(ctx, {cpu::linear_fwd}, 1e-6, std::span(&kLarge, 1));
}

TEST(LinearInt8Cuda, SeveralPieces) {
  on_cuda([](Context& ctx) {
    const Shape s = {130, 2048, 17000};
    const Case c(DType::bf16, DType::f32, s, 3, 0), few(DType::bf16, DType::f32, s, 3, 0);
    ctx.engine().linear_fwd(ctx, c.op());
    ctx.batch_invariant = true;  // by the other way
    ctx.engine().linear_fwd(ctx, few.op());
    EXPECT_TRUE(close(c.y, few.y.to_double(), 3e-6));
    EXPECT_TRUE(c.y.guards_intact());
    ctx.batch_invariant = false;
    check_against_reference(ctx, {ctx.engine().linear_fwd}, 3e-6, std::span(&kLarge, 1));
  });
}

void expect_batch_invariant(Context& ctx, Forward fwd, const Shape& s, int64_t gap = 1) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    const Case whole(dtype, DType::f32, s, 9, gap);
    fwd(ctx, whole.op());
    for (int64_t size : {1, 2, 3, 5, 7, 64}) {
      const TestTensor y(DType::f32, {s.tokens, s.out});
      for (int64_t begin = 0; begin < s.tokens; begin += size) {
        Linear part = whole.op();
        const int64_t end = std::min(s.tokens, begin + size);
        part.x = whole.x.view().slice(0, begin, end);
        part.y = y.view().slice(0, begin, end);
        fwd(ctx, part);
      }
      EXPECT_TRUE(bitwise_equal(y, whole.y)) << "in parts of " << size;
    }
  }
}

TEST(LinearInt8, BatchInvariant) {
  Context ctx(reference_engine(), 2);
  ctx.batch_invariant = true;
  for_each_simd_target([&] { expect_batch_invariant(ctx, cpu::linear_fwd, {77, 203, 41}); });
}

TEST(LinearInt8Cuda, BatchInvariant) {
  on_cuda([](Context& ctx) {
    ctx.batch_invariant = true;
    for (const Shape& s : {Shape{77, 203, 41}, Shape{130, 768, 200}, Shape{20, 768, 2300}})
      expect_batch_invariant(ctx, ctx.engine().linear_fwd, s);
    // Widened, in pieces of the matrix.
    expect_batch_invariant(ctx, ctx.engine().linear_fwd, {600, 2048, 17000}, 0);
  });
}

// The first context's run against two runs in the second.
void expect_same_bits(Context& one, Context& two, Forward fwd) {
  for (const Shape& s : {Shape{3, 100, 50}, Shape{40, 130, 70}, Shape{200, 304, 2300}})
    for (DType dtype : {DType::f32, DType::bf16}) {
      const Case a(dtype, dtype, s, 4), b(dtype, dtype, s, 4), c(dtype, dtype, s, 4);
      fwd(one, a.op());
      fwd(two, b.op());
      fwd(two, c.op());
      EXPECT_TRUE(bitwise_equal(b.y, c.y)) << "two runs";
      EXPECT_TRUE(bitwise_equal(a.y, b.y)) << "two contexts";
    }
}

TEST(LinearInt8, SameBitsTwiceAndForAnyThreads) {
  Context one(reference_engine(), 1), two(reference_engine(), 2);
  expect_same_bits(one, two, cpu::linear_fwd);
}

TEST(LinearInt8Cuda, SameBitsTwiceAndRecorded) {
  on_cuda([](Context& ctx) {
    expect_same_bits(ctx, ctx, ctx.engine().linear_fwd);
    for (int64_t tokens : {1, 300}) {
      const Shape s = {tokens, 64, 2300};
      const Case direct(DType::bf16, DType::bf16, s, 4), replayed(DType::bf16, DType::bf16, s, 4);
      ctx.engine().linear_fwd(ctx, direct.op());
      const auto recording =
          ctx.engine().record(ctx, [&] { ctx.engine().linear_fwd(ctx, replayed.op()); });
      ctx.engine().replay(ctx, recording);
      EXPECT_TRUE(bitwise_equal(direct.y, replayed.y));
    }
  });
}

TEST(LinearInt8, NoTokensAndNoLastingWorkspace) {
  Context ctx(reference_engine(), 2);
  cpu::linear_fwd(ctx, Case(DType::f32, DType::f32, {0, 9, 4}, 2).op());
  const Case c(DType::bf16, DType::bf16, {40, 64, 600}, 1);
  const auto position = [&] {
    const Arena::Scope scope(ctx.workspace());
    return ctx.workspace().allocate(1);
  };
  cpu::linear_fwd(ctx, c.op());
  const int64_t before = ctx.workspace().block_allocations();
  const void* top = position();
  for (int i = 0; i < 3; ++i) cpu::linear_fwd(ctx, c.op());
  EXPECT_EQ(ctx.workspace().block_allocations(), before);
  EXPECT_EQ(position(), top) << "workspace not given back";
}

TEST(LinearInt8, CostCountsABytePerWeight) {
  const Case c(DType::bf16, DType::bf16, {2, 100, 10}, 1);
  EXPECT_EQ(linear_cost(c.op()).bytes, 2 * 100 * 2 + 100 * 10 + 10 * 4 + 10 * 4 + 2 * 10 * 2);
  EXPECT_EQ(linear_cost(c.op()).flops, 2 * 2 * 100 * 10);
}

TEST(LinearInt8, EntryRefusesWrongArguments) {
  Context ctx(reference_engine(), 1);
  const Case c(DType::bf16, DType::f32, {2, 3, 4}, 1);
  linear_fwd(ctx, c.op());
  Linear op = c.op();
  op.weight_scale = {};
  EXPECT_THROW(linear_fwd(ctx, op), CheckFailure);
  op.weight_scale = c.weight_scale.view().slice(0, 0, 3);
  EXPECT_THROW(linear_fwd(ctx, op), CheckFailure);
  op = c.op();
  const TestTensor unquantized(DType::bf16, {4, 3});
  op.weight = unquantized;
  EXPECT_THROW(linear_fwd(ctx, op), CheckFailure);
  const TestTensor dy(DType::bf16, {2, 4}), dx(DType::bf16, {2, 3});
  EXPECT_THROW(linear_bwd(ctx, c.op(), {.dy = dy, .dx = dx, .dweight = {}, .dbias = {}}),
               CheckFailure);
}

}  // namespace
}  // namespace krait::op_test
