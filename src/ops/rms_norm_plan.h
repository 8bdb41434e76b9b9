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

// A row lies in the registers of `threads` threads: up to a warp, of which a block then has several
// rows, or whole warps, one row to a block.
struct RmsRowLayout {
  int threads, block_rows;
};

// With few rows (tokens below the number of multiprocessors) a row's threads are many, else as few
// as leave the least idle. most: vectors of one thread.
inline RmsRowLayout rms_row_layout(int64_t tokens, int64_t d_model, int most, int multiprocessors) {
  constexpr int kWarp = 32, kBlock = 128;
  const int vectors = static_cast<int>(d_model / kRmsVector);
  if (vectors <= kWarp * most && tokens >= multiprocessors) {
    int threads = 8;
    while (threads < kWarp && threads < vectors) threads *= 2;
    return {threads, kBlock / threads};
  }
  const auto threads = [&](int each) {
    return ((vectors + each - 1) / each + kWarp - 1) / kWarp * kWarp;
  };
  int best = most;
  for (int each = most - 1; each >= 1 && threads(each) <= kRmsMaxThreads; --each)
    if (tokens < multiprocessors || threads(each) * each < threads(best) * best) best = each;
  return {threads(best), 1};
}

// Where a row does not fit (`in_registers` is false), or its memory is not aligned, a block reads
// it twice.
struct RmsNormPlan {
  bool in_registers;
  RmsRowLayout fwd, bwd;
  int64_t fwd_blocks;  // a row at a time
  int bwd_vectors;     // of a thread: 2 or kRmsVectors
  int64_t bwd_blocks;  // each takes every bwd_blocks-th group of rows, and sums its part of dweight
};

// batch_invariant: the forward layout, on which a row's bits depend, is that of many rows.
// bf16_stream: the residual stream's type. Its rows take half the registers, so that all of a row's
// inputs can be on their way at once in rows of two vectors to a thread; with an f32 stream longer
// rows with fewer threads are faster (measured).
inline RmsNormPlan plan_rms_norm(int64_t tokens, int64_t d_model, bool aligned, bool bf16_stream,
                                 int multiprocessors, bool batch_invariant = false) {
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  RmsNormPlan plan{};
  if (!aligned || d_model % kRmsVector != 0 || d_model > kRmsMaxWidth) {
    plan.fwd_blocks = plan.bwd_blocks = tokens;
    return plan;
  }
  plan.in_registers = true;
  plan.fwd = rms_row_layout(batch_invariant ? std::max<int64_t>(tokens, multiprocessors) : tokens,
                            d_model, kRmsVectors, multiprocessors);
  plan.fwd_blocks = blocks(tokens, plan.fwd.block_rows);
  const bool two = bf16_stream && d_model <= int64_t{kRmsVector} * 2 * kRmsMaxThreads;
  plan.bwd_vectors = two ? 2 : kRmsVectors;
  plan.bwd = rms_row_layout(tokens, d_model, plan.bwd_vectors, multiprocessors);
  const int threads_at_once = two ? 768 : 512;  // by their registers
  const int blocks_at_once =
      std::max(1, threads_at_once / (plan.bwd.threads * plan.bwd.block_rows));
  plan.bwd_blocks =
      std::min(blocks(tokens, plan.bwd.block_rows), int64_t{multiprocessors} * blocks_at_once);
  return plan;
}

}  // namespace krait::cuda
