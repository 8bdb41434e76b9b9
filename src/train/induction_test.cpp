// Learning, end to end: a small Mamba learns to recall over short sequences and does so over
// sequences 16 times as long; the same model with delta, B and C independent of the input cannot.
#include <gtest/gtest.h>

#include <cstdio>

#include "ops/op_test.h"
#include "train/experiment.h"
#include "train/test_folder.h"

namespace krait {
namespace {

ExperimentSettings small_induction() {
  ExperimentSettings s = paper_settings(Task::induction_heads);
  s.threads = 1;  // the ops are too small to share
  s.task.length = 64;
  s.d_model = 32;
  s.d_state = 8;
  // With the paper's dt_min, 0.001, the state lasts for 64 tokens without selection, so short
  // sequences do not teach the model to ignore what lies between.
  s.dt_min = 0.01;
  s.batch_size = 16;
  s.growth_steps = 100;
  s.lr = 5e-3;
  s.adam.beta2 = 0.95;
  s.steps = 3000;  // about half of them are needed
  s.eval_every = 50;
  s.eval_sequences = 64;
  s.goal = 0.97;
  s.max_loss = 1;
  s.test_lengths = {64, 1024};
  s.max_test_sequences = 128;
  return s;
}

ExperimentResult result_of(const Engine& engine, const ExperimentSettings& s) {
  const TestFolder folder;
  Experiment experiment(engine, s, folder.path() / "run", /*resume=*/false, {});
  const ExperimentResult r = experiment.run();
  EXPECT_TRUE(r.trained && r.tested);
  if (r.tests.size() == 2)
    std::printf("%lld steps: %.1f %% at length 64, %.1f %% at length 1024\n",
                static_cast<long long>(r.step), 100 * r.tests[0].token_accuracy(),
                100 * r.tests[1].token_accuracy());
  return r;
}

void expect_solved(const Engine& engine) {
  const ExperimentResult r = result_of(engine, small_induction());
  ASSERT_EQ(r.tests.size(), 2u);
  EXPECT_GE(r.tests[0].token_accuracy(), 0.99);
  EXPECT_GE(r.tests[1].token_accuracy(), 0.95);
}

TEST(Induction, SelectiveModelSolvesItAtSixteenTimesTheLength) { expect_solved(cpu_engine()); }

TEST(InductionCuda, SelectiveModelSolvesItAtSixteenTimesTheLength) {
  op_test::on_cuda([](Context& ctx) { expect_solved(ctx.engine()); });
}

TEST(Induction, WithoutSelectionItDoesNot) {
  ExperimentSettings s = small_induction();
  s.selective = false;
  s.steps = 500;
  const ExperimentResult r = result_of(cpu_engine(), s);
  ASSERT_EQ(r.tests.size(), 2u);
  EXPECT_LE(r.tests[1].token_accuracy(), 0.25);  // chance: 6 %
  EXPECT_FALSE(r.reached(s.goal));
}

}  // namespace
}  // namespace krait
