#include "ops/cross_entropy_plan.h"

#include <gtest/gtest.h>

namespace krait {
namespace {

TEST(CrossEntropyPlan, ChunksAreEvenAndBounded) {
  for (int64_t vocab_size : {1, 2, 15, 16, 257, 1024, 1025, 8192, 8193, 50280, 131071, 262144})
    for (int64_t tokens : {int64_t{0}, int64_t{1}, int64_t{127}, int64_t{65536}, int64_t{65537},
                           (int64_t{1} << 20) + 1}) {
      SCOPED_TRACE(testing::Message() << tokens << " x " << vocab_size);
      const CrossEntropyPlan plan = CrossEntropyPlan::make(tokens, vocab_size);
      EXPECT_GE(plan.pitch, vocab_size);
      EXPECT_EQ(plan.pitch % CrossEntropyPlan::kPitchElements, 0);
      EXPECT_GT(plan.chunk_tokens, 0);
      EXPECT_EQ(plan.chunk_tokens % CrossEntropyPlan::kRowTile, 0);
      EXPECT_LE(4 * plan.pitch * plan.chunk_tokens, CrossEntropyPlan::kChunkBytes);
      EXPECT_EQ(plan.threads % plan.threads_per_row, 0);
      EXPECT_LE(plan.threads, 1024);
      EXPECT_GE(plan.blocks(plan.chunk_tokens) * (plan.threads / plan.threads_per_row),
                plan.chunk_tokens);
    }
}

TEST(CrossEntropyPlan, ChunksOfTheHeadAreLong) {
  EXPECT_GE(CrossEntropyPlan::make(65536, 50280).chunk_tokens, 4096);
  EXPECT_EQ(CrossEntropyPlan::make(65536, 16).chunk_tokens, 65536);
}

}  // namespace
}  // namespace krait
