// How the linear layer's own CUDA kernels cut their work (products by cuBLASLt need no plan).
#pragma once

#include <algorithm>
#include <cstdint>

namespace krait {

// gemm_tiled: one block of kThreads for each kTile x kTile tile of c, k in panels of kPanel.
struct GemmTiledPlan {
  static constexpr int kTile = 64, kPanel = 16, kThreads = 256;
  // Panels whose products are summed by themselves before they join the total: shorter chains of
  // additions. A constant, so that an element's bits depend on k alone.
  static constexpr int kPanelsPerSum = 16;
  int64_t tiles_m = 0, tiles_n = 0;  // grid x and y

  static GemmTiledPlan make(int64_t m, int64_t n) {
    return {.tiles_m = (m + kTile - 1) / kTile, .tiles_n = (n + kTile - 1) / kTile};
  }
};

// linear_matvec: a group of threads, a block or a warp, sums kRows outputs of one token, or of
// kMaxTokens.
struct LinearMatvecPlan {
  static constexpr int kRows = 4, kMaxTokens = 4, kThreads = 128, kWarp = 32;
  static constexpr int64_t kMaxTokenBlocks = 65535;  // grid.y
  int64_t output_blocks = 0,
          token_blocks = 0;  // grid x and y; the latter's blocks may take several
  int tokens_per_block = 0;
  int threads_per_group = 0;

  // Whether the outputs of one token take no more blocks than are resident at once (four to a
  // multiprocessor, by their registers). Up to there it beats cuBLASLt, which leaves
  // multiprocessors idle: 4096 x 160 in 2.7 us instead of 7.0, 4096 x 2048 in 6.5 instead of 9.2 on
  // an H200; 768 x 50280 takes 43 instead of 23.
  static bool one_wave(int64_t out_features, int multiprocessors) {
    return out_features <= int64_t{4} * multiprocessors * kRows;
  }

  static LinearMatvecPlan make(int64_t tokens, int64_t out_features) {
    return make(tokens, out_features, kThreads, tokens == 1 ? 1 : kMaxTokens);
  }

  // Weights in 8 bits. Groups of a warp where there are outputs enough: a block would find too
  // little to do, in four rows of 768 only 3 KB. This decides an output's bits, so it does not
  // depend on the number of tokens.
  static LinearMatvecPlan make_int8(int64_t tokens, int64_t out_features, int multiprocessors) {
    return make(tokens, out_features, one_wave(out_features, multiprocessors) ? kThreads : kWarp,
                tokens == 1 ? 1 : kMaxTokens);
  }

 private:
  static LinearMatvecPlan make(int64_t tokens, int64_t out_features, int threads_per_group,
                               int tokens_per_block) {
    LinearMatvecPlan plan;
    plan.threads_per_group = threads_per_group;
    plan.tokens_per_block = tokens_per_block;
    const int64_t outputs_per_block = kRows * (kThreads / threads_per_group);
    plan.output_blocks = (out_features + outputs_per_block - 1) / outputs_per_block;
    plan.token_blocks =
        std::min(kMaxTokenBlocks, (tokens + tokens_per_block - 1) / tokens_per_block);
    return plan;
  }
};

// linear_int8_tiles: a block owns kTile outputs of up to tokens_per_block tokens, or twice as many
// outputs; its warps share the inputs, kPanel at a time.
struct LinearInt8TilesPlan {
  static constexpr int kTile = 16, kTokenTile = 8, kPanel = 64, kWarp = 32;
  static constexpr int kMaxTokens = 64;  // of a block
  int tokens_per_block = 0;
  int outputs_per_block = 0;
  int warps = 0;
  int64_t output_blocks = 0, token_blocks = 0;  // grid x and y

  // How many blocks of tokens read the weights before it is faster to widen them in memory, for
  // products by cuBLASLt.
  static constexpr int64_t kMaxTokenBlocks = 2;
  // Without tiles: up to here linear_matvec is faster than that.
  static constexpr int64_t kMatvecTokens = 16;

  static bool takes(int64_t tokens, int64_t in_features) {
    return tokens <= kMaxTokenBlocks * kMaxTokens && in_features % kPanel == 0;
  }

  // More outputs where there are many tokens: x is read anew for each block. Fewer warps then,
  // whose sums meet in shared memory.
  static LinearInt8TilesPlan make(int64_t tokens, int64_t out_features) {
    LinearInt8TilesPlan plan;
    plan.tokens_per_block = kTokenTile;
    while (plan.tokens_per_block < std::min<int64_t>(tokens, kMaxTokens))
      plan.tokens_per_block *= 2;
    const bool many = plan.tokens_per_block > 2 * kTokenTile;
    plan.outputs_per_block = many ? 2 * kTile : kTile;
    plan.warps = many ? 4 : 8;
    plan.output_blocks = (out_features + plan.outputs_per_block - 1) / plan.outputs_per_block;
    plan.token_blocks = (tokens + plan.tokens_per_block - 1) / plan.tokens_per_block;
    return plan;
  }
};

// linear_skinny: kCluster blocks share the inputs of a tile of kTile rows and kTile outputs.
struct LinearSkinnyPlan {
  static constexpr int kTile = 32, kThreads = 128, kCluster = 8;
  int64_t output_blocks = 0, row_blocks = 0;  // grid x and y

  // Tens of rows, few outputs: where cuBLASLt has few tiles, and shares their sums in a second
  // kernel. 128 rows, 4096 to 160: 6.5 us there.
  static bool fits(int64_t rows, int64_t in_features, int64_t out_features) {
    return rows > 8 && rows <= 256 && out_features <= 320 && in_features % 32 == 0 &&
           in_features >= 1024 && in_features <= (int64_t{1} << 20);
  }

  static LinearSkinnyPlan make(int64_t rows, int64_t out_features) {
    return {.output_blocks = (out_features + kTile - 1) / kTile * kCluster,
            .row_blocks = (rows + kTile - 1) / kTile};
  }
};

// linear_dbias: a block sums kColumns columns of rows_per_block rows, kLanes rows at a time; then
// a second kernel sums the blocks' results.
struct LinearDbiasPlan {
  static constexpr int kColumns = 64, kLanes = 4, kThreads = kColumns * kLanes;
  static constexpr int64_t kMinRows = 64, kBlocksWanted = 1024;
  int64_t column_blocks = 0, row_blocks = 0;  // grid x and y
  int64_t rows_per_block = 0;                 // a multiple of kLanes

  static LinearDbiasPlan make(int64_t tokens, int64_t out_features) {
    LinearDbiasPlan plan;
    plan.column_blocks = (out_features + kColumns - 1) / kColumns;
    const int64_t wanted = std::max<int64_t>(1, kBlocksWanted / plan.column_blocks);
    const int64_t rows = std::max(kMinRows, (tokens + wanted - 1) / wanted);
    plan.rows_per_block = (rows + kLanes - 1) / kLanes * kLanes;
    plan.row_blocks = (tokens + plan.rows_per_block - 1) / plan.rows_per_block;
    return plan;
  }
};

}  // namespace krait
