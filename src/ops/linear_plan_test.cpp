#include "ops/linear_plan.h"

#include <gtest/gtest.h>

namespace krait {
namespace {

constexpr int64_t kGridYLimit = 65535;
const int64_t kExtents[] = {1, 3, 4, 5, 63, 64, 65, 80, 255, 1536, 50280, 262144};

TEST(LinearPlan, TilesCoverTheProduct) {
  for (int64_t m : kExtents)
    for (int64_t n : kExtents) {
      const GemmTiledPlan plan = GemmTiledPlan::make(m, n);
      EXPECT_GE(plan.tiles_m * GemmTiledPlan::kTile, m);
      EXPECT_LT((plan.tiles_m - 1) * GemmTiledPlan::kTile, m);
      EXPECT_GE(plan.tiles_n * GemmTiledPlan::kTile, n);
      EXPECT_LE(plan.tiles_n, kGridYLimit);
    }
}

TEST(LinearPlan, BlocksCoverEveryOutputOnce) {
  for (int64_t tokens : {int64_t{1}, int64_t{2}, int64_t{4}, int64_t{5}, int64_t{1} << 21})
    for (int64_t out : kExtents) {
      const LinearMatvecPlan plan = LinearMatvecPlan::make(tokens, out);
      constexpr int64_t kOutputs = LinearMatvecPlan::kRows;
      EXPECT_GE(plan.output_blocks * kOutputs, out);
      EXPECT_LT((plan.output_blocks - 1) * kOutputs, out);
      EXPECT_LE(plan.token_blocks, kGridYLimit);
      EXPECT_GE(plan.token_blocks, std::min(kGridYLimit, tokens / LinearMatvecPlan::kMaxTokens));
      EXPECT_LE((plan.token_blocks - 1) * plan.tokens_per_block, tokens);
    }
}

TEST(LinearPlan, NarrowOutputsTakeOneWave) {
  EXPECT_TRUE(LinearMatvecPlan::one_wave(80, 132));
  EXPECT_TRUE(LinearMatvecPlan::one_wave(2048, 132));
  EXPECT_FALSE(LinearMatvecPlan::one_wave(2048, 100));
  EXPECT_FALSE(LinearMatvecPlan::one_wave(50280, 132));
}

TEST(LinearPlan, BlocksCoverEveryRowOnce) {
  for (int64_t tokens :
       {int64_t{1}, int64_t{5}, int64_t{64}, int64_t{65}, int64_t{100003}, (int64_t{1} << 20) + 1})
    for (int64_t width : kExtents) {
      const LinearDbiasPlan plan = LinearDbiasPlan::make(tokens, width);
      EXPECT_GE(plan.row_blocks * plan.rows_per_block, tokens);
      EXPECT_LT((plan.row_blocks - 1) * plan.rows_per_block, tokens);
      EXPECT_GE(plan.column_blocks * LinearDbiasPlan::kColumns, width);
      EXPECT_LE(plan.row_blocks, kGridYLimit);
      // The blocks' sums are small beside dy.
      EXPECT_LE(plan.row_blocks * LinearDbiasPlan::kMinRows, tokens + LinearDbiasPlan::kMinRows);
    }
}

}  // namespace
}  // namespace krait
