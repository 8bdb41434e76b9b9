#include "ops/causal_conv1d_plan.h"

#include <gtest/gtest.h>

namespace krait::cuda {
namespace {

TEST(CausalConv1dPlan, BlocksCoverEveryElementOnce) {
  for (int64_t tokens : {1, 2, 7, 8, 9, 255, 256, 257, 65536, (1 << 20) + 1})
    for (int64_t d_inner : {1, 3, 8, 9, 31, 255, 256, 257, 1536, 5120, 16384})
      for (int vector : {1, 4, 8})
        for (int multiprocessors : {1, 48, 132}) {
          if (d_inner % vector != 0) continue;
          SCOPED_TRACE(testing::Message() << tokens << " x " << d_inner << " by " << vector);
          const CausalConv1dPlan plan =
              plan_causal_conv1d(tokens, d_inner, vector, 2, multiprocessors);
          EXPECT_EQ(plan.columns * plan.rows, kConvThreads);
          const int64_t block_tokens = int64_t{plan.rows} * plan.run;
          const int64_t block_channels = int64_t{plan.columns} * vector;
          EXPECT_GE(plan.token_blocks * block_tokens, tokens);
          EXPECT_LT((plan.token_blocks - 1) * block_tokens, tokens);
          EXPECT_GE(plan.channel_blocks * block_channels, d_inner);
          EXPECT_LT((plan.channel_blocks - 1) * block_channels, d_inner);
          EXPECT_LE(plan.channel_blocks, 65535);
          EXPECT_GE(plan.run, 8);
          EXPECT_LE(plan.run, 256);
        }
}

TEST(CausalConv1dPlan, RunsAreLongWhereTheGpuIsFull) {
  EXPECT_EQ(plan_causal_conv1d(65536, 1536, 8, 2, 132).run, 64);
  EXPECT_EQ(plan_causal_conv1d(65536, 1536, 4, 2, 132).run, 128);
  EXPECT_EQ(plan_causal_conv1d(2048, 1536, 8, 2, 132).run, 8);
}

TEST(CausalConv1dPlan, StepCoversEveryChannelAndSequence) {
  for (int64_t num_seqs : {1, 3, 128, 70000})
    for (int64_t d_inner : {1, 511, 512, 4096})
      for (int vector : {1, kConvStepVector}) {
        const CausalConv1dStepPlan plan = plan_causal_conv1d_step(num_seqs, d_inner, vector, 132);
        EXPECT_GE(plan.channel_blocks * vector * kConvStepThreads, d_inner);
        EXPECT_GE(plan.sequence_blocks * plan.sequences, num_seqs);
        EXPECT_LE(plan.sequence_blocks, 65535);
      }
  EXPECT_EQ(plan_causal_conv1d_step(128, 4096, 4, 132).sequences, kConvStepSequences);
  EXPECT_EQ(plan_causal_conv1d_step(16, 1536, 4, 132).sequences, 1);
}

}  // namespace
}  // namespace krait::cuda
