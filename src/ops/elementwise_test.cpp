#include "ops/elementwise.h"

#include <algorithm>
#include <cmath>

#include "ops/op_test.h"

namespace krait::op_test {
namespace {

// On a part of the tensors that begins at `first`, which may not be aligned.
void check_against_definitions(Context& ctx, int64_t first, int64_t size) {
  SCOPED_TRACE(testing::Message() << size << " from " << first);
  Rng rng(7);
  const auto part = [&](const TestTensor& t) { return t.view().slice(0, first, first + size); };
  const std::initializer_list<int64_t> shape = {first + size + 3};
  TestTensor x(DType::f32, shape), y(DType::f32, shape), sum(DType::f32, shape),
      out(DType::f32, shape), half(DType::bf16, shape), total(DType::f64, {1});
  for (TestTensor* t : {&x, &y, &sum}) t->normal(rng, 2);
  total.values({0.25});
  const std::vector<double> a = to_double(part(x)), b = to_double(part(y)),
                            before = sum.to_double();
  const auto expect = [&](const TestTensor& t, const auto& value, double tolerance) {
    std::vector<double> expected(a.size());
    for (size_t i = 0; i < a.size(); ++i) expected[i] = value(i);
    EXPECT_TRUE(close(to_double(part(t)), expected, tolerance));
    EXPECT_TRUE(t.guards_intact());
  };

  round_elements(ctx, part(x), part(half));
  expect(
      half, [&](size_t i) { return static_cast<double>(bf16(a[i])); }, 0);
  negative_exp(ctx, part(x), part(out));
  expect(
      out, [&](size_t i) { return -std::exp(a[i]); }, 2e-7);
  copy_elements(ctx, part(x), part(out));
  expect(
      out, [&](size_t i) { return a[i]; }, 0);
  fill_zero(ctx, part(out));
  expect(
      out, [](size_t) { return 0.0; }, 0);
  add_product(ctx, part(x), part(y), part(sum));
  const auto at = [&](size_t i) { return before[static_cast<size_t>(first) + i]; };
  expect(
      sum, [&](size_t i) { return at(i) + a[i] * b[i]; }, 2e-7);
  sum_elements(ctx, part(x), total);
  double expected = 0.25;
  for (double v : a) expected += v;
  EXPECT_NEAR(total.to_double()[0], expected, 1e-11 * (1 + static_cast<double>(size)));

  // What lies beside the part is as it was.
  const std::vector<double> after = sum.to_double();
  for (size_t i = 0; i < static_cast<size_t>(first); ++i) EXPECT_EQ(after[i], before[i]);
  for (size_t i = static_cast<size_t>(first + size); i < after.size(); ++i)
    EXPECT_EQ(after[i], before[i]);
}

// More than are moved at once, and not a multiple of it.
void check_clipped_offsets(Context& ctx) {
  const std::vector<double> values = {0,  0,  3,  10, 10, 12, 12, 12, 13,        20,
                                      21, 22, 23, 24, 25, 26, 27, 28, 2147483647};
  TestTensor offsets(DType::i32, {19}), clipped(DType::i32, {19});
  offsets.values(values);
  for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 2147483647}, {3, 11}, {4, 9}, {12, 12}, {12, 27}}) {
    clip_offsets(ctx, offsets.view(), begin, end, clipped.view());
    std::vector<double> expected;
    for (const double x : values)
      expected.push_back(std::clamp(x, static_cast<double>(begin), static_cast<double>(end)) -
                         static_cast<double>(begin));
    EXPECT_EQ(clipped.to_double(), expected) << begin << " to " << end;
    EXPECT_TRUE(clipped.guards_intact());
  }
}

void check_copied_rows(Context& ctx) {
  Rng rng(3);
  for (const int64_t width : {1, 3, 64}) {
    TestTensor x(DType::f32, {5, width}, width + 3), y(DType::f32, {5, width}, width + 7),
        dense(DType::f32, {5, width});
    x.normal(rng);
    copy_elements(ctx, x, y);
    copy_elements(ctx, y, dense);
    EXPECT_TRUE(bitwise_equal(x, dense)) << width;
    EXPECT_TRUE(y.guards_intact()) << width;
  }
}

void check_sizes(Context& ctx) {
  check_copied_rows(ctx);
  check_clipped_offsets(ctx);
  for (int64_t first : {0, 1, 8})
    for (int64_t size : {0, 1, 7, 8, 9, 2047, 2048, 2049, 100001})
      check_against_definitions(ctx, first, size);
}

TEST(Elementwise, MatchesTheDefinitions) {
  for (const Engine* engine : {&reference_engine(), &cpu_engine()}) {
    Context ctx(*engine, 2);
    check_sizes(ctx);
  }
}

TEST(ElementwiseCuda, MatchesTheDefinitions) { on_cuda(check_sizes); }

}  // namespace
}  // namespace krait::op_test
