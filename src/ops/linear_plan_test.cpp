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
    for (int64_t out : kExtents)
      for (bool int8 : {false, true}) {
        const LinearMatvecPlan plan = int8 ? LinearMatvecPlan::make_int8(tokens, out, 132)
                                           : LinearMatvecPlan::make(tokens, out);
        const int64_t outputs =
            LinearMatvecPlan::kRows * (LinearMatvecPlan::kThreads / plan.threads_per_group);
        EXPECT_EQ(outputs, int8 && !LinearMatvecPlan::one_wave(out, 132) ? 16 : 4);
        EXPECT_GE(plan.output_blocks * outputs, out);
        EXPECT_LT((plan.output_blocks - 1) * outputs, out);
        EXPECT_LE(plan.token_blocks, kGridYLimit);
        EXPECT_GE(plan.token_blocks, std::min(kGridYLimit, tokens / LinearMatvecPlan::kMaxTokens));
        EXPECT_LE((plan.token_blocks - 1) * plan.tokens_per_block, tokens);
      }
}

TEST(LinearPlan, TilesCoverEveryOutputOnce) {
  using Plan = LinearInt8TilesPlan;
  for (int64_t tokens : {1, 2, 8, 9, 16, 17, 64, 65, 128})
    for (int64_t out : kExtents) {
      ASSERT_TRUE(Plan::takes(tokens, 768));
      const Plan plan = Plan::make(tokens, out);
      EXPECT_GE(plan.output_blocks * plan.outputs_per_block, out);
      EXPECT_LT((plan.output_blocks - 1) * plan.outputs_per_block, out);
      EXPECT_GE(plan.token_blocks * plan.tokens_per_block, tokens);
      EXPECT_LT((plan.token_blocks - 1) * plan.tokens_per_block, tokens);
      EXPECT_LE(plan.token_blocks, Plan::kMaxTokenBlocks);
      // The warps' sums, with a gap, in the shared memory that needs no asking for.
      EXPECT_LE(plan.warps * plan.tokens_per_block * (plan.outputs_per_block + 4) * 4, 48 << 10);
    }
  EXPECT_FALSE(Plan::takes(129, 768));
  EXPECT_FALSE(Plan::takes(2, 776));
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

TEST(LinearPlan, SkinnyCoversEveryOutput) {
  for (int64_t rows : {5, 8, 32, 33, 256})
    for (int64_t out : {1, 80, 160, 288}) {
      ASSERT_TRUE(LinearSkinnyPlan::fits(rows) && LinearSkinnyPlan::possible(4096, out));
      const LinearSkinnyPlan plan = LinearSkinnyPlan::make(rows, out);
      EXPECT_EQ(plan.output_blocks % LinearSkinnyPlan::kCluster, 0);
      EXPECT_GE(plan.output_blocks / LinearSkinnyPlan::kCluster * LinearSkinnyPlan::kTile, out);
      EXPECT_GE(plan.row_blocks * LinearSkinnyPlan::kTile, rows);
    }
  EXPECT_FALSE(LinearSkinnyPlan::fits(1));
  EXPECT_FALSE(LinearSkinnyPlan::possible(4096, 2048));
  EXPECT_FALSE(LinearSkinnyPlan::possible(4100, 160));
}

TEST(LinearPlan, TilesCoverEveryOutputAndFitOnChip) {
  constexpr int64_t kOneBlock = 227 << 10, kOneMultiprocessor = 228 << 10, kOfEachBlock = 1 << 10;
  for (int64_t tokens :
       {int64_t{1}, int64_t{17}, int64_t{500}, int64_t{16384}, (int64_t{1} << 20) + 1})
    for (int64_t in : {8, 64, 136, 4096})
      for (int64_t out : {1, 160, 8192, 50280}) {
        const LinearTilesPlan plan = LinearTilesPlan::make(tokens, in, out, 132);
        EXPECT_GE(plan.token_tiles * plan.tokens, tokens);
        EXPECT_LT((plan.token_tiles - 1) * plan.tokens, tokens);
        EXPECT_GE(plan.output_tiles * plan.outputs(), out);
        EXPECT_LE(plan.shared_bytes(), kOneBlock);
        EXPECT_LE(plan.together() * (plan.shared_bytes() + kOfEachBlock), kOneMultiprocessor);
        // y's tile in bf16, in the ring's place.
        EXPECT_GE(plan.stages * plan.stage_bytes(), plan.tokens * (plan.outputs() + 8) * 2);
        EXPECT_LE(plan.stages, LinearTilesPlan::kMaxStages);
      }
  // Few tokens take small tiles, many large ones.
  EXPECT_EQ(LinearTilesPlan::make(1, 2048, 50280, 132).tokens, 16);
  EXPECT_EQ(LinearTilesPlan::make(100, 4096, 2048, 132).tokens, 64);
  EXPECT_EQ(LinearTilesPlan::make(16384, 2048, 8192, 132).tokens, LinearTilesPlan::kMaxTokens);
}

}  // namespace
}  // namespace krait
