// How the CUDA norm is laid out: pure arithmetic, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace krait::cuda {

inline constexpr int kRmsVector = 8;            // elements of one access to a row
inline constexpr int kRmsVectors = 4;           // at most, of one thread
inline constexpr int kRmsMaxThreads = 512;      // of one block
inline constexpr int kRmsGeneralThreads = 256;  // of one block, where rows do not fit or align
inline constexpr int64_t kRmsMaxWidth =         // longest row that is kept in registers
    int64_t{kRmsVector} * kRmsVectors * kRmsMaxThreads;
inline constexpr int kRmsGeneralTokens = 256;  // summed by one thread into dweight

// A row lies in the registers of `row_threads` threads: up to a warp, of which a block then has
// several rows, or whole warps, one row to a block. row_threads 0: a row does not fit, or its
// memory is not aligned; it is read twice, by a block.
struct RmsNormPlan {
  int row_threads, block_rows;
  int64_t fwd_blocks;  // a row at a time
  int64_t bwd_blocks;  // each takes every bwd_blocks-th group of rows, and sums its part of dweight
};

inline RmsNormPlan plan_rms_norm(int64_t tokens, int64_t d_model, bool aligned,
                                 int multiprocessors) {
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  RmsNormPlan plan{};
  if (!aligned || d_model % kRmsVector != 0 || d_model > kRmsMaxWidth) {
    plan.block_rows = 1;
    plan.fwd_blocks = tokens;
    plan.bwd_blocks = tokens;
    return plan;
  }
  constexpr int kWarp = 32, kBlock = 128;
  const int vectors = static_cast<int>(d_model / kRmsVector);
  if (vectors <= kWarp * kRmsVectors && tokens >= multiprocessors) {
    plan.row_threads = 8;
    while (plan.row_threads < kWarp && plan.row_threads < vectors) plan.row_threads *= 2;
    plan.block_rows = kBlock / plan.row_threads;
  } else {
    // With few rows a row's threads are many; else as few as leave the least idle.
    const auto threads = [&](int each) {
      return static_cast<int>(blocks(blocks(vectors, each), kWarp)) * kWarp;
    };
    int best = kRmsVectors;
    for (int each = kRmsVectors - 1; each >= 1; --each) {
      if (threads(each) > kRmsMaxThreads) break;
      if (tokens < multiprocessors || threads(each) * each < threads(best) * best) best = each;
    }
    plan.row_threads = threads(best);
    plan.block_rows = 1;
  }
  const int block_threads = plan.row_threads * plan.block_rows;
  plan.fwd_blocks = blocks(tokens, plan.block_rows);
  plan.bwd_blocks = std::min(
      plan.fwd_blocks, int64_t{multiprocessors} * std::max(1, kRmsMaxThreads / block_threads));
  return plan;
}

}  // namespace krait::cuda
