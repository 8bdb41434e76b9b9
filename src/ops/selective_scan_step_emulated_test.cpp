// The kernel of the scan's step with dt_proj, its source as it is, on the CPU
// (emulated/emulator.h): both of its forms compute the step, and give the same bits.
#include "cuda_words.h"

// Behind the words that they use.
#include <gtest/gtest.h>

#include "ops/engine.h"
#include "ops/selective_scan_step_ahead.cuh"
#include "ops/selective_scan_step_projected.cuh"
#include "ops/selective_scan_step_test.h"

namespace krait::cuda {
namespace {

using namespace scan_step;
using op_test::close;
using step_test::Step;
using step_test::StepCase;

template <class S, int kSequences, int kBlocks>
void run_on(const Step& step) {
  const Args a = arguments(step.op);
  for (int c = 0; c < a.d_inner / kChannels<S>; ++c)
    for (int s = 0; s * kSequences < a.num_seqs; ++s)
      emulated::run({.index = 0,
                     .blocks = 1,
                     .threads = kThreads,
                     .shared_bytes = shared_bytes<S, kSequences, kBlocks>(a.dt_rank)},
                    emulated::Copies::at_once, 1, [&](char* memory) {
                      scan_step::run<S, kSequences, kBlocks>(
                          a, reinterpret_cast<unsigned char*>(memory), c, s);
                    });
  EXPECT_TRUE(step.guards_intact());
}

// By blocks of few channels, with a ring that holds a part of the sequences.
template <class S>
void run_ahead(const Step& step, emulated::Copies when, uint64_t seed) {
  const Args a = arguments(step.op);
  const ScanStepAheadPlan plan = plan_selective_scan_step_ahead({.tokens = a.num_seqs,
                                                                 .num_seqs = a.num_seqs,
                                                                 .d_inner = a.d_inner,
                                                                 .d_state = kStates,
                                                                 .n_groups = 1,
                                                                 .state_bytes = sizeof(S)},
                                                                a.dt_rank, 14, 20 << 10);
  ASSERT_TRUE(plan.usable);
  for (int block = 0; block < plan.groups * plan.members; ++block)
    emulated::run({.index = 0,
                   .blocks = 1,
                   .threads = plan.threads + kWarp,
                   .shared_bytes = static_cast<size_t>(plan.shared_bytes)},
                  when, seed, [&](char* memory) {
                    Ahead<S>(plan, a, reinterpret_cast<unsigned char*>(memory), block).run();
                  });
  EXPECT_TRUE(step.guards_intact());
}

// Around groups of sequences, both counts of channels, whole and half groups of dt's terms.
const std::vector<StepCase>& shapes() {
  static const std::vector<StepCase> all = {
      {.num_seqs = 41, .d_inner = 128, .dt_rank = 48},
      {.num_seqs = 3, .d_inner = 128, .dt_rank = 256, .z = false},
      {.num_seqs = 32, .d_inner = 64, .dt_rank = 128, .D = false, .slots = false},
      {.num_seqs = 9, .d_inner = 64, .dt_rank = 16, .dt_bias = false},
      {.num_seqs = 131, .d_inner = 64, .dt_rank = 80},
  };
  return all;
}

template <class S, int kMany>
void expect_step(DType states) {
  Context reference(reference_engine(), 1);
  for (const StepCase& s : shapes()) {
    SCOPED_TRACE(testing::Message() << s);
    // The engine's own states are f32, from the same values.
    Step expected(s, DType::bf16, DType::f32), few(s, DType::bf16, states),
        many(s, DType::bf16, states);
    for (Step* step : {&expected, &few, &many}) step->make_inexact();
    expected.state.values(few.state.to_double());
    krait::selective_scan_step(reference, expected.op);
    run_on<S, kProjectedFewSequences, 4>(few);
    run_on<S, kMany, 4>(many);
    EXPECT_TRUE(close(few.y, expected.y.to_double(), 2e-3));  // roundings to bf16 that differ
    EXPECT_TRUE(close(few.state, expected.state.to_double(), states == DType::f32 ? 3e-4 : 3e-3));
    EXPECT_EQ(many.y.to_double(), few.y.to_double());
    EXPECT_EQ(many.state.to_double(), few.state.to_double());
    uint64_t seed = 0;
    for (const auto when : {emulated::Copies::at_once, emulated::Copies::late,
                            emulated::Copies::random, emulated::Copies::random}) {
      Step ahead(s, DType::bf16, states);
      ahead.make_inexact();
      ahead.op.settled = seed % 2 == 0;
      run_ahead<S>(ahead, when, ++seed);
      EXPECT_EQ(ahead.y.to_double(), few.y.to_double());
      EXPECT_EQ(ahead.state.to_double(), few.state.to_double());
    }
    if constexpr (sizeof(S) == 4) {
      Step eight(s, DType::bf16, states), eight_few(s, DType::bf16, states);
      for (Step* step : {&eight, &eight_few}) step->make_inexact();
      run_on<S, kMany, 8>(eight);
      run_on<S, kProjectedFewSequences, 8>(eight_few);
      for (const Step* other : {&eight, &eight_few}) {
        EXPECT_EQ(other->y.to_double(), few.y.to_double());
        EXPECT_EQ(other->state.to_double(), few.state.to_double());
      }
    }
  }
}

TEST(ScanStepEmulated, ComputesTheStepInEveryForm) { expect_step<float, 32>(DType::f32); }
TEST(ScanStepEmulated, ComputesTheStepInEveryFormOnBf16States) {
  expect_step<bf16, 16>(DType::bf16);
}

}  // namespace
}  // namespace krait::cuda
