// How the CUDA embedding is laid out: pure arithmetic, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace krait::cuda {

inline constexpr int kEmbeddingThreads = 256;  // of a block of the forward pass
inline constexpr int kEmbeddingVector = 8;     // columns of a thread where alignment allows

// The gradient works through the tokens sorted by id, in pieces; a block owns `columns` threads'
// columns of one piece. Where a run of equal ids goes on past its piece, what its pieces gave is
// added up by a second kernel, `kEmbeddingCombineRows` pieces side by side.
inline constexpr int kEmbeddingPiece = 32;  // tokens
inline constexpr int kEmbeddingCombineRows = 8;

struct EmbeddingPlan {
  int64_t fwd_blocks;
  int64_t pieces;         // grid.x
  int columns;            // threads
  int64_t column_blocks;  // grid.y
  int key_bits;           // of an id
};

inline EmbeddingPlan plan_embedding(int64_t tokens, int64_t vocab_size, int64_t d_model,
                                    int vector) {
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  const int64_t vectors = blocks(d_model, vector);
  EmbeddingPlan plan{};
  plan.fwd_blocks = blocks(tokens * vectors, kEmbeddingThreads);
  plan.pieces = blocks(tokens, kEmbeddingPiece);
  plan.columns = static_cast<int>(std::min<int64_t>(blocks(vectors, 32), 4)) * 32;
  plan.column_blocks = blocks(vectors, plan.columns);
  plan.key_bits = 1;
  while ((int64_t{1} << plan.key_bits) < vocab_size) ++plan.key_bits;
  return plan;
}

}  // namespace krait::cuda
