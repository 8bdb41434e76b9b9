// How the CUDA convolution is laid out: pure arithmetic, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

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

// longest_run: tokens; shorter where the GPU would otherwise have too few blocks.
inline CausalConv1dPlan plan_causal_conv1d(int64_t tokens, int64_t d_inner, int vector,
                                           int longest_run, int multiprocessors) {
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  CausalConv1dPlan plan{};
  plan.vector = vector;
  const int64_t vectors = blocks(d_inner, vector);
  plan.columns = 1;
  while (plan.columns < 32 && plan.columns < vectors) plan.columns *= 2;
  plan.rows = kConvThreads / plan.columns;
  plan.channel_blocks = blocks(vectors, plan.columns);
  constexpr int kShortestRun = 8;
  for (plan.run = longest_run;; plan.run /= 2) {
    plan.token_blocks = blocks(tokens, int64_t{plan.rows} * plan.run);
    if (plan.run / 2 < kShortestRun) break;
    if (plan.token_blocks * plan.channel_blocks >= int64_t{4} * multiprocessors) break;
  }
  return plan;
}

}  // namespace krait::cuda
