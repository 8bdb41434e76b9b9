// How the CUDA convolution is laid out: pure arithmetic, tested without a GPU.
#pragma once

#include <cstdint>
#include <limits>

namespace krait::cuda {

// A thread owns `vector` neighbouring channels and walks a run of tokens; a block has `columns`
// threads side by side along channels and `rows` runs one after the other along tokens. A token's
// result does not depend on the run it falls into, so runs may be cut anywhere.
struct CausalConv1dPlan {
  int vector;              // channels
  int columns, rows;       // threads
  int run;                 // tokens
  int64_t token_blocks;    // grid.x
  int64_t channel_blocks;  // grid.y
};

inline constexpr int kConvThreads = 256;
inline constexpr int kConvTaps = 4;        // d_conv, filled up with zero weights in front
inline constexpr int kConvQuantities = 5;  // sums over tokens: dweight of each tap, dbias

// blocks_at_once: of one multiprocessor. A run costs its tokens and about as much again as
// kConvRunStart tokens take (weights, sequence, first inputs, sums); the run is the one with which
// the rounds of blocks cost least.
inline CausalConv1dPlan plan_causal_conv1d(int64_t tokens, int64_t d_inner, int vector,
                                           int blocks_at_once, int multiprocessors) {
  constexpr int kShortestRun = 8, kLongestRun = 256, kConvRunStart = 16;
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  CausalConv1dPlan plan{};
  plan.vector = vector;
  const int64_t vectors = blocks(d_inner, vector);
  plan.columns = 1;
  while (plan.columns < 32 && plan.columns < vectors) plan.columns *= 2;
  plan.rows = kConvThreads / plan.columns;
  plan.channel_blocks = blocks(vectors, plan.columns);
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int run = kShortestRun; run <= kLongestRun; run *= 2) {
    const int64_t token_blocks = blocks(tokens, int64_t{plan.rows} * run);
    const int64_t rounds =
        blocks(token_blocks * plan.channel_blocks, int64_t{blocks_at_once} * multiprocessors);
    if (const int64_t cost = rounds * (run + kConvRunStart); cost < least) {
      least = cost;
      plan.run = run;
      plan.token_blocks = token_blocks;
    }
  }
  return plan;
}

inline constexpr int kConvStepThreads = 128, kConvStepVector = 4, kConvStepSequences = 4;

// One token for each sequence: a thread has `vector` channels of `sequences` sequences.
struct CausalConv1dStepPlan {
  int sequences;                            // 1 or kConvStepSequences
  int64_t channel_blocks, sequence_blocks;  // grid.x, grid.y
};

// Several sequences to a thread, which reads its weights once, where that leaves a block for each
// multiprocessor.
inline CausalConv1dStepPlan plan_causal_conv1d_step(int64_t num_seqs, int64_t d_inner, int vector,
                                                    int multiprocessors) {
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  CausalConv1dStepPlan plan{.sequences = 1, .channel_blocks = 0, .sequence_blocks = 0};
  plan.channel_blocks = blocks(d_inner, int64_t{vector} * kConvStepThreads);
  const bool many = plan.channel_blocks * num_seqs >= int64_t{kConvStepSequences} * multiprocessors;
  if (many || num_seqs > 65535) plan.sequences = kConvStepSequences;
  plan.sequence_blocks = blocks(num_seqs, plan.sequences);
  return plan;
}

}  // namespace krait::cuda
