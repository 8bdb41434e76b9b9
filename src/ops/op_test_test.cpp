// The comparisons themselves: each accepts what it should and refuses what it should, NaN first of
// all.
#include "ops/op_test.h"

#include <cmath>

namespace krait::op_test {
namespace {

TEST(Comparison, RefusesNaNAndErrors) {
  const std::vector<double> ref = {1, 2, 3};
  EXPECT_TRUE(close({1, 2, 3}, ref, 0));
  EXPECT_TRUE(close({1, 2, 3.0001}, ref, 1e-4));
  EXPECT_FALSE(close({1, 2, 3.1}, ref, 1e-4));
  EXPECT_FALSE(close({1, 2, std::nan("")}, ref, 1e9));
  EXPECT_FALSE(close({1, 2, INFINITY}, ref, 1e9));
  EXPECT_FALSE(relative_max({1, std::nan(""), 3}, ref) <= 1e9);
  EXPECT_FALSE(close({1e-3, 0, 0}, {0, 0, 0}, 1e-4));
}

TEST(Comparison, GuardsSeeAWriteIntoAGap) {
  TestTensor t(DType::f32, {2, 3}, 5);
  t.zero();
  EXPECT_TRUE(t.guards_intact());
  t.view().ptr<float>()[3] = 1;
  EXPECT_FALSE(t.guards_intact());
  TestTensor u(DType::bf16, {4});
  u.view().ptr<bf16>()[4] = bf16(1.0f);
  EXPECT_FALSE(u.guards_intact());
}

TEST(Comparison, OutputsStartAsNaN) {
  EXPECT_FALSE(close(TestTensor(DType::f32, {3}).to_double(), {0, 0, 0}, 1e9));
}

TEST(Comparison, GradientCheckSeesAWrongGradient) {
  Rng rng(1);
  TestTensor x(DType::f64, {5});
  x.normal(rng);
  const auto objective = [&] {
    double sum = 0;
    for (double v : x.to_double()) sum += std::exp(v);
    return sum;
  };
  std::vector<double> gradient = x.to_double();
  for (double& g : gradient) g = std::exp(g);
  EXPECT_TRUE(gradient_matches(x, gradient, objective, rng));
  gradient[2] *= 1 + 1e-5;
  EXPECT_FALSE(gradient_matches(x, gradient, objective, rng));
}

TEST(Comparison, Bf16RuleAllowsTwiceTheRoundingOnly) {
  const std::vector<double> oracle = {1.001, 2.003, 3.017, 5.1234};
  TestTensor y(DType::bf16, {4});
  y.values(oracle);
  EXPECT_TRUE(close_bf16(y, oracle));
  y.values({1.001, 2.04, 3.017, 5.1234});
  EXPECT_FALSE(close_bf16(y, oracle));
}

}  // namespace
}  // namespace krait::op_test
