// How the CUDA cross entropy cuts its tokens into chunks, and a chunk's rows among threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace krait {

struct CrossEntropyPlan {
  // A chunk's logits. Long chunks keep the products with the weights efficient, and the gradient of
  // the weights is read and written once a chunk.
  static constexpr int64_t kChunkBytes = int64_t{1} << 30;
  static constexpr int64_t kRowTile = 128;      // rows of a matrix product's tile
  static constexpr int64_t kPitchElements = 8;  // rows start 16-byte aligned, in f32 and bf16
  static constexpr int kMaxThreads = 1024;

  int64_t pitch = 0;         // elements from one row of f32 logits to the next
  int64_t chunk_tokens = 0;  // of every chunk but the last
  int threads_per_row = 0;   // a warp, or a block
  int threads = 0;           // of a block

  int64_t blocks(int64_t rows) const {
    const int64_t rows_per_block = threads / threads_per_row;
    return (rows + rows_per_block - 1) / rows_per_block;
  }

  static CrossEntropyPlan make(int64_t tokens, int64_t vocab_size) {
    const auto round_up = [](int64_t x, int64_t to) { return (x + to - 1) / to * to; };
    CrossEntropyPlan plan;
    plan.pitch = round_up(vocab_size, kPitchElements);
    const int64_t rows = std::max(kRowTile, kChunkBytes / (4 * plan.pitch) / kRowTile * kRowTile);
    const int64_t chunks = std::max<int64_t>(1, (tokens + rows - 1) / rows);
    plan.chunk_tokens = round_up((tokens + chunks - 1) / chunks, kRowTile);  // even chunks
    plan.threads_per_row = vocab_size <= 1024 ? 32 : vocab_size <= 8192 ? 256 : kMaxThreads;
    plan.threads = std::max(256, plan.threads_per_row);
    return plan;
  }
};

}  // namespace krait
