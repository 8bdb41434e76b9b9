#include "ops/embedding_plan.h"

#include <gtest/gtest.h>

namespace krait::cuda {
namespace {

TEST(EmbeddingPlan, BlocksCoverTokensAndColumns) {
  for (int64_t tokens : {1, 31, 32, 33, 65536, 1 << 20})
    for (int64_t d_model : {1, 7, 8, 64, 768, 2560, 5120})
      for (int vector : {1, 8}) {
        if (d_model % vector != 0) continue;
        SCOPED_TRACE(testing::Message() << tokens << " x " << d_model << " by " << vector);
        const EmbeddingPlan plan = plan_embedding(tokens, 50280, d_model, vector);
        const int64_t vectors = d_model / vector;
        EXPECT_GE(plan.fwd_blocks * kEmbeddingThreads, tokens * vectors);
        EXPECT_GE(plan.pieces * kEmbeddingPiece, tokens);
        EXPECT_LT((plan.pieces - 1) * kEmbeddingPiece, tokens);
        EXPECT_EQ(plan.columns % 32, 0);
        EXPECT_LE(plan.columns, 128);
        EXPECT_GE(plan.column_blocks * plan.columns, vectors);
        EXPECT_LT((plan.column_blocks - 1) * plan.columns, vectors);
        EXPECT_LE(plan.column_blocks, 65535);
      }
}

TEST(EmbeddingPlan, KeysHaveTheVocabularysBits) {
  for (auto [vocab_size, bits] :
       {std::pair{1, 1}, {2, 1}, {3, 2}, {256, 8}, {257, 9}, {50280, 16}, {1 << 18, 18}})
    EXPECT_EQ(plan_embedding(10, vocab_size, 8, 8).key_bits, bits) << vocab_size;
}

}  // namespace
}  // namespace krait::cuda
