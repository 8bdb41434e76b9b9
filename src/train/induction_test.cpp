// Learning, end to end: a small Mamba learns to recall over short sequences and does so over
// sequences 16 times as long; the same model with delta, B and C independent of the input cannot.
#include <gtest/gtest.h>

#include <cstdio>

#include "ops/op_test.h"
#include "train/experiment_induction.h"

namespace krait {
namespace {

void expect_solved(const Engine& engine) {
  InductionSettings s;
  s.threads = 1;  // the ops are too small to share
  const InductionResult r = run_induction(engine, s);
  std::printf("%lld steps: %.1f %% at length 64, %.1f %% at length 1024\n",
              static_cast<long long>(r.steps), 100 * r.accuracy, 100 * r.long_accuracy);
  EXPECT_GE(r.accuracy, 0.99);
  EXPECT_GE(r.long_accuracy, 0.95);
}

TEST(Induction, SelectiveModelSolvesItAtSixteenTimesTheLength) { expect_solved(cpu_engine()); }

TEST(InductionCuda, SelectiveModelSolvesItAtSixteenTimesTheLength) {
  op_test::on_cuda([](Context& ctx) { expect_solved(ctx.engine()); });
}

TEST(Induction, WithoutSelectionItDoesNot) {
  InductionSettings s;
  s.threads = 1;
  s.selective = false;
  s.max_steps = 500;
  const InductionResult r = run_induction(cpu_engine(), s);
  std::printf("without selection: %.1f %% at length 64, %.1f %% at length 1024\n", 100 * r.accuracy,
              100 * r.long_accuracy);
  EXPECT_LE(r.long_accuracy, 0.25);  // chance: 6 %
}

}  // namespace
}  // namespace krait
