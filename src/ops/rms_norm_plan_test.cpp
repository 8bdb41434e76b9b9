#include "ops/rms_norm_plan.h"

#include <gtest/gtest.h>

namespace krait::cuda {
namespace {

TEST(RmsNormPlan, RowsFitTheirThreadsAndBlocksCoverTheRows) {
  for (int64_t tokens : {1, 2, 131, 132, 300, 65536, (1 << 20) + 1})
    for (int64_t d_model : {1, 7, 8, 16, 64, 72, 768, 1024, 1032, 2048, 2560, 5120, 8200, 16384})
      for (int multiprocessors : {1, 132}) {
        SCOPED_TRACE(testing::Message() << tokens << " x " << d_model);
        const RmsNormPlan plan = plan_rms_norm(tokens, d_model, true, multiprocessors);
        if (d_model % kRmsVector != 0) {
          EXPECT_EQ(plan.row_threads, 0);
          EXPECT_EQ(plan.fwd_blocks, tokens);
          continue;
        }
        EXPECT_GE(int64_t{plan.row_threads} * kRmsVectors * kRmsVector, d_model);
        EXPECT_LE(plan.row_threads * plan.block_rows, kRmsMaxThreads);
        if (plan.block_rows > 1) {
          EXPECT_EQ(32 % plan.row_threads, 0);  // a row within a warp
        } else {
          EXPECT_EQ(plan.row_threads % 32, 0);
        }
        EXPECT_GE(plan.fwd_blocks * plan.block_rows, tokens);
        EXPECT_LT((plan.fwd_blocks - 1) * plan.block_rows, tokens);
        EXPECT_GE(plan.bwd_blocks, 1);
        EXPECT_LE(plan.bwd_blocks, plan.fwd_blocks);
      }
}

TEST(RmsNormPlan, LongOrUnalignedRowsAreReadTwice) {
  EXPECT_EQ(plan_rms_norm(10, 16384 + 8, true, 132).row_threads, 0);
  EXPECT_EQ(plan_rms_norm(10, 768, false, 132).row_threads, 0);
  EXPECT_EQ(plan_rms_norm(10, 768, false, 132).bwd_blocks, 10);
}

}  // namespace
}  // namespace krait::cuda
