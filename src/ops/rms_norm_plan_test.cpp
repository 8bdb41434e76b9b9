#include "ops/rms_norm_plan.h"

#include <gtest/gtest.h>

namespace krait::cuda {
namespace {

TEST(RmsNormPlan, RowsFitTheirThreadsAndBlocksCoverTheRows) {
  for (int64_t tokens : {1, 2, 131, 132, 300, 65536, (1 << 20) + 1})
    for (int64_t d_model : {1, 7, 8, 16, 64, 72, 768, 1024, 1032, 2048, 2560, 5120, 8200, 16384})
      for (auto [multiprocessors, bf16_stream] : {std::pair{1, false}, {132, false}, {132, true}}) {
        SCOPED_TRACE(testing::Message() << tokens << " x " << d_model);
        const RmsNormPlan plan = plan_rms_norm(tokens, d_model, true, bf16_stream, multiprocessors);
        EXPECT_EQ(plan.in_registers, d_model % kRmsVector == 0);
        if (!plan.in_registers) {
          EXPECT_EQ(plan.fwd_blocks, tokens);
          continue;
        }
        for (auto [layout, vectors] :
             {std::pair{plan.fwd, kRmsVectors}, {plan.bwd, plan.bwd_vectors}}) {
          EXPECT_GE(int64_t{layout.threads} * vectors * kRmsVector, d_model);
          EXPECT_LE(layout.threads * layout.block_rows, kRmsMaxThreads);
          if (layout.block_rows > 1) {
            EXPECT_EQ(32 % layout.threads, 0);  // a row within a warp
          } else {
            EXPECT_EQ(layout.threads % 32, 0);
          }
        }
        EXPECT_GE(plan.fwd_blocks * plan.fwd.block_rows, tokens);
        EXPECT_LT((plan.fwd_blocks - 1) * plan.fwd.block_rows, tokens);
        EXPECT_GE(plan.bwd_blocks, 1);
        EXPECT_LE((plan.bwd_blocks - 1) * plan.bwd.block_rows, tokens);
      }
}

TEST(RmsNormPlan, BatchInvariantLayoutDoesNotLookAtTheNumberOfRows) {
  for (int64_t d_model : {64, 768, 2048, 8192})
    for (bool batch_invariant : {false, true}) {
      const RmsRowLayout few = plan_rms_norm(1, d_model, true, false, 132, batch_invariant).fwd;
      const RmsRowLayout many = plan_rms_norm(300, d_model, true, false, 132, batch_invariant).fwd;
      EXPECT_EQ(few.threads == many.threads && few.block_rows == many.block_rows, batch_invariant)
          << d_model;
    }
}

TEST(RmsNormPlan, LongOrUnalignedRowsAreReadTwice) {
  EXPECT_FALSE(plan_rms_norm(10, 16384 + 8, true, false, 132).in_registers);
  EXPECT_FALSE(plan_rms_norm(10, 768, false, false, 132).in_registers);
  EXPECT_EQ(plan_rms_norm(10, 768, false, false, 132).bwd_blocks, 10);
}

}  // namespace
}  // namespace krait::cuda
