#include "ops/cross_entropy_plan.h"

#include <gtest/gtest.h>

namespace krait {
namespace {

using Plan = CrossEntropyPlan;
constexpr size_t kSharedBytes[] = {99 << 10, 163 << 10,
                                   227 << 10};  // of compute capability 12, 8, 9
constexpr int64_t kVocabSizes[] = {1,    2,     15,    16,    257,   1024,  1025,   8192,
                                   8193, 14336, 14337, 50280, 57344, 57345, 131071, 262144};

TEST(CrossEntropyPlan, ChunksAreEvenAndBounded) {
  for (int64_t vocab_size : kVocabSizes)
    for (int64_t tokens : {int64_t{0}, int64_t{1}, int64_t{127}, int64_t{65536}, int64_t{65537},
                           (int64_t{1} << 20) + 1}) {
      SCOPED_TRACE(testing::Message() << tokens << " x " << vocab_size);
      const Plan plan = Plan::make(tokens, vocab_size, kSharedBytes[2]);
      EXPECT_GE(plan.pitch, vocab_size);
      EXPECT_EQ(plan.pitch % Plan::kPitchElements, 0);
      EXPECT_GT(plan.chunk_tokens, 0);
      EXPECT_EQ(plan.chunk_tokens % Plan::kRowTile, 0);
      EXPECT_LE(4 * plan.pitch * plan.chunk_tokens, Plan::kChunkBytes);
    }
}

TEST(CrossEntropyPlan, ThreadsCoverEveryRow) {
  for (size_t shared : kSharedBytes)
    for (int64_t vocab_size : kVocabSizes)
      for (int64_t rows : {1, 7, 100, 4096, 1 << 20}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << vocab_size << ", " << shared);
        const Plan plan = Plan::make(rows, vocab_size, shared);
        const int64_t blocks = plan.blocks(rows, 132);
        EXPECT_GE(blocks, 1);
        EXPECT_LE(plan.threads, 1024);
        if (plan.rows == CrossEntropyRows::warp) {
          EXPECT_GE(blocks * (plan.threads / 32), rows);
        }
        if (plan.rows == CrossEntropyRows::two_passes) {
          EXPECT_EQ(blocks, rows);
        }
        if (plan.rows != CrossEntropyRows::staged) continue;
        EXPECT_GE(int64_t{plan.vectors} * plan.threads * Plan::kWidth, vocab_size);
        EXPECT_LE(plan.vectors, Plan::kBatches * Plan::kVectorsPerBatch);
        EXPECT_GE(plan.blocks_per_processor, 1);
        EXPECT_LE(static_cast<size_t>(plan.blocks_per_processor) *
                      (plan.shared_bytes + Plan::kStaticSharedBytes),
                  shared);
      }
}

TEST(CrossEntropyPlan, KnownVocabularies) {
  const Plan head = Plan::make(65536, 50280, kSharedBytes[2]);
  EXPECT_EQ(head.chunk_tokens, 4096);
  EXPECT_EQ(head.rows, CrossEntropyRows::staged);
  EXPECT_EQ(Plan::make(65536, 50280, kSharedBytes[0]).rows, CrossEntropyRows::two_passes);
  EXPECT_EQ(Plan::make(65536, 16, kSharedBytes[2]).rows, CrossEntropyRows::warp);
  EXPECT_EQ(Plan::make(65536, 16, kSharedBytes[2]).chunk_tokens, 65536);
}

}  // namespace
}  // namespace krait
