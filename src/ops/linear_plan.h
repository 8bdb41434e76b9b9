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
  // products by linear_tiles or cuBLASLt.
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

  // Some rows or tens, few outputs: where cuBLASLt has few tiles, and shares their sums in a second
  // kernel. 128 rows, 4096 to 160: 6.5 us there; 8 rows: a decoder step lost 5 us a layer.
  static bool fits(int64_t rows) { return rows > 4 && rows <= 256; }
  static bool possible(int64_t in_features, int64_t out_features) {
    return out_features <= 320 && in_features % 32 == 0 && in_features >= 1024 &&
           in_features <= (int64_t{1} << 20);
  }

  static LinearSkinnyPlan make(int64_t rows, int64_t out_features) {
    return {.output_blocks = (out_features + kTile - 1) / kTile * kCluster,
            .row_blocks = (rows + kTile - 1) / kTile};
  }
};

// linear_tiles: a block for each tile of `tokens` rows of x and groups * kGroup outputs, whose
// inputs pass through a ring in shared memory, kStep at a time. The tile decides no bits.
struct LinearTilesPlan {
  static constexpr int kStep = 64, kGroup = 64, kAlignment = 1024;
  static constexpr int kMaxTokens = 256, kMaxStages = 8;
  static constexpr int kTogether = 8;             // tiles of tokens whose blocks are neighbours
  static constexpr int kSharedBytes = 200 << 10;  // at most
  static constexpr int kSharedOfTwo = 104 << 10;  // where two blocks share a multiprocessor
  static constexpr int64_t kMacsPerCycle = 2048, kBytesPerCycle = 50;  // of a multiprocessor

  // Few tokens, and few inputs or a small matrix: there faster than cuBLASLt, 64 tokens' in_proj of
  // 130M in 5.1 us instead of 7.7, 128 tokens' dt_proj of 1.4B in 3.9 instead of 9.5 on an H100.
  static bool suits(int64_t tokens, int64_t in, int64_t out) {
    constexpr int64_t kSmall = 768 * 3072;
    return (tokens <= 128 && in <= 256) || (tokens <= 256 && in <= 1536 && in * out <= kSmall);
  }

  int tokens = 0, groups = 0, stages = 0;
  int64_t token_tiles = 0, output_tiles = 0;

  int outputs() const { return kGroup * groups; }
  int threads() const { return 128 * groups + 32; }
  int64_t blocks() const { return token_tiles * output_tiles; }
  int stage_bytes() const { return (tokens + outputs()) * kStep * 2; }
  int shared_bytes() const { return kAlignment + stages * (stage_bytes() + 16); }
  int together() const { return tokens == kMaxTokens ? 1 : 2; }  // blocks on a multiprocessor

  static LinearTilesPlan make(int64_t tokens, int64_t in, int64_t out, int multiprocessors) {
    LinearTilesPlan best;
    int64_t least = 0;
    for (const auto& [rows, groups] : kTiles) {
      LinearTilesPlan plan;
      plan.tokens = rows;
      plan.groups = groups;
      plan.token_tiles = (tokens + rows - 1) / rows;
      plan.output_tiles = (out + plan.outputs() - 1) / plan.outputs();
      const int64_t cost = plan.cycles(multiprocessors);
      if (best.tokens > 0 && cost >= least) continue;
      best = plan, least = cost;
    }
    const int room = best.together() == 1 ? kSharedBytes : kSharedOfTwo;
    best.stages = std::min((room - kAlignment) / (best.stage_bytes() + 16), kMaxStages);
    const int64_t steps = (in + kStep - 1) / kStep;
    best.stages = static_cast<int>(
        std::min<int64_t>(best.stages, std::max<int64_t>(steps, best.least_stages())));
    return best;
  }

 private:
  struct Size {
    int tokens, groups;
  };
  static constexpr Size kTiles[] = {{256, 2}, {128, 2}, {128, 1}, {64, 1}, {16, 1}};

  // Of a step: as long as its products take, or its bytes, in rounds of as many blocks as run at
  // once.
  int64_t cycles(int multiprocessors) const {
    const int64_t at_once = int64_t{multiprocessors} * together();
    const int64_t of_block = std::max<int64_t>(int64_t{tokens} * outputs() * kStep / kMacsPerCycle,
                                               stage_bytes() / kBytesPerCycle);
    const int64_t rounds = (blocks() + at_once - 1) / at_once;
    return rounds * of_block *
           std::min<int64_t>(together(), (blocks() + multiprocessors - 1) / multiprocessors);
  }

  // y takes the ring's place.
  int least_stages() const {
    return (tokens * (outputs() + 8) * 2 + stage_bytes() - 1) / stage_bytes();
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
