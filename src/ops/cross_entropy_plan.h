// How the CUDA cross entropy cuts its tokens into chunks, and a chunk's rows among threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace krait {

enum class CrossEntropyRows {
  warp,       // a warp owns a row
  staged,     // a block keeps a row in shared memory while the next one arrives
  two_passes  // a block reads a row twice
};

struct CrossEntropyPlan {
  // A chunk's logits. Long chunks keep the products with the weights efficient, and the gradient of
  // the weights is read and written once a chunk. 4096 tokens of a vocabulary of 50280.
  static constexpr int64_t kChunkBytes = int64_t{800} << 20;
  static constexpr int64_t kRowTile = 128;      // rows of a matrix product's tile
  static constexpr int64_t kPitchElements = 8;  // rows start 16-byte aligned, in f32 and bf16
  static constexpr int64_t kMaxWarpRow = 1024;  // elements
  static constexpr int kSmallBlock = 256, kLargeBlock = 1024;  // threads
  // staged: a thread keeps up to kBatches * kVectorsPerBatch vectors of kWidth elements.
  static constexpr int kWidth = 4, kBatches = 7, kVectorsPerBatch = 2;
  static constexpr int kThreadElements = kWidth * kBatches * kVectorsPerBatch;
  static constexpr size_t kStaticSharedBytes = 1024;  // what a block needs besides, at most

  int64_t pitch = 0;         // elements from one row of f32 logits to the next
  int64_t chunk_tokens = 0;  // of every chunk but the last
  CrossEntropyRows rows = CrossEntropyRows::warp;
  int threads = 0;               // of a block
  int vectors = 0;               // staged: of a thread
  size_t shared_bytes = 0;       // staged: of a block, dynamic
  int blocks_per_processor = 0;  // staged

  // Blocks for `count` rows.
  int64_t blocks(int64_t count, int multiprocessors) const {
    if (rows == CrossEntropyRows::two_passes) return count;
    if (rows == CrossEntropyRows::warp) return (count + threads / 32 - 1) / (threads / 32);
    return std::min<int64_t>(count, int64_t{multiprocessors} * blocks_per_processor);
  }

  static CrossEntropyPlan make(int64_t tokens, int64_t vocab_size, size_t shared_bytes_per_block) {
    const auto round_up = [](int64_t x, int64_t to) { return (x + to - 1) / to * to; };
    CrossEntropyPlan plan;
    plan.pitch = round_up(vocab_size, kPitchElements);
    const int64_t rows = std::max(kRowTile, kChunkBytes / (4 * plan.pitch) / kRowTile * kRowTile);
    // Even chunks.
    const int64_t chunks = std::max<int64_t>(1, (tokens + rows - 1) / rows);
    plan.chunk_tokens = std::max(kRowTile, round_up((tokens + chunks - 1) / chunks, kRowTile));
    plan.threads = vocab_size <= kSmallBlock * kThreadElements ? kSmallBlock : kLargeBlock;
    if (vocab_size <= kMaxWarpRow) return plan;
    const int64_t vectors = round_up(vocab_size, kWidth * plan.threads) / (kWidth * plan.threads);
    plan.shared_bytes = static_cast<size_t>(vectors * plan.threads * kWidth) * sizeof(float);
    const size_t needed = plan.shared_bytes + kStaticSharedBytes;
    if (vectors > kBatches * kVectorsPerBatch || needed > shared_bytes_per_block) {
      plan.rows = CrossEntropyRows::two_passes;
      plan.threads = kLargeBlock;
      plan.shared_bytes = 0;
      return plan;
    }
    plan.rows = CrossEntropyRows::staged;
    plan.vectors = static_cast<int>(vectors);
    plan.blocks_per_processor = static_cast<int>(std::min<size_t>(
        shared_bytes_per_block / needed, static_cast<size_t>(1024 / plan.threads)));
    return plan;
  }
};

}  // namespace krait
