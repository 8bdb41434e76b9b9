// How the CPU engine cuts a selective scan into independent pieces; shared by its forward and
// backward files.
//
// Vector lanes are channels. A block is up to kBlock channels of one group of B and C; the pieces
// of the forward pass are (sequence, block), with time inside. Rows are staged as f32 tiles of
// kScanChunk tokens, so that element types and odd widths exist at the edges of a tile only. Cuts
// depend on the shape alone, never on the number of threads: results do not either.
#pragma once

#include <algorithm>

#include "ops/selective_scan.h"

namespace krait::cpu {

inline constexpr int64_t kBlock = 64;      // channels
inline constexpr int64_t kScanChunk = 32;  // tokens between saved states

struct ScanPlan {
  int64_t d_inner, d_state, channels_per_group, blocks_per_group, num_blocks, num_seqs;
  const int32_t* start;  // (num_seqs + 1)
  const float* A_log2e;  // (num_blocks, d_state, kBlock): A log2(e), zero beyond a block's channels

  explicit ScanPlan(const SelectiveScan& op)
      : d_inner(op.u.shape[1]),
        d_state(op.A.shape[1]),
        channels_per_group(d_inner / op.B.shape[1]),
        blocks_per_group((channels_per_group + kBlock - 1) / kBlock),
        num_blocks(blocks_per_group * op.B.shape[1]),
        num_seqs(op.seq_start ? op.seq_start.shape[0] - 1 : 0),
        start(op.seq_start ? op.seq_start.ptr<int32_t>() : nullptr),
        A_log2e(nullptr) {}

  int64_t group(int64_t block) const { return block / blocks_per_group; }
  int64_t first_channel(int64_t block) const {
    return group(block) * channels_per_group + block % blocks_per_group * kBlock;
  }
  int64_t channels(int64_t block) const {
    return std::min(kBlock, channels_per_group - block % blocks_per_group * kBlock);
  }
  const float* A_of(int64_t block) const { return A_log2e + block * d_state * kBlock; }

  // Where `saved` keeps the states before token t, the start of a sequence's second or a later
  // chunk: (d_state, channels). Such tokens lie at least kScanChunk apart and after token
  // kScanChunk - 1, which makes t / kScanChunk - 1 a number of its own.
  int64_t saved_offset(int64_t t, int64_t block) const {
    return ((t / kScanChunk - 1) * d_inner + first_channel(block)) * d_state;
  }
};

// The states of one block of channels of one sequence's slot; null when there is no state.
template <class S = float>
S* state_of(const Tensor& state, const Tensor& slot, int64_t sequence, int64_t channel) {
  if (!state) return nullptr;
  return state.row<S>(slot ? slot.ptr<int32_t>()[sequence] : sequence) + channel * state.stride[1];
}

// Between (channels, d_state) in memory and (d_state, kBlock) in a tile. A null source reads as
// zero.
template <class S>
void load_states(const S* state, int64_t channels, int64_t d_state, float* h) {
  for (int64_t n = 0; n < d_state; ++n)
    for (int64_t c = 0; c < kBlock; ++c)
      h[n * kBlock + c] = state && c < channels ? static_cast<float>(state[c * d_state + n]) : 0.0f;
}
template <class S>
void store_states(const float* h, int64_t channels, int64_t d_state, S* state) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t n = 0; n < d_state; ++n)
      state[c * d_state + n] = static_cast<S>(h[n * kBlock + c]);
}

// Between op.state and a tile; without a state: zero, and nothing is kept.
inline void load_initial_states(const SelectiveScan& op, const ScanPlan& plan, int64_t sequence,
                                int64_t block, float* h) {
  dispatch_f32_bf16(op.state.dtype, [&](auto tag) {
    load_states(state_of<typename decltype(tag)::type>(op.state, op.slot, sequence,
                                                       plan.first_channel(block)),
                plan.channels(block), plan.d_state, h);
  });
}
inline void store_final_states(const SelectiveScan& op, const ScanPlan& plan, int64_t sequence,
                               int64_t block, const float* h) {
  if (!op.state) return;
  dispatch_f32_bf16(op.state.dtype, [&](auto tag) {
    store_states(h, plan.channels(block), plan.d_state,
                 state_of<typename decltype(tag)::type>(op.state, op.slot, sequence,
                                                        plan.first_channel(block)));
  });
}

// Fills plan.A_log2e from the workspace of ctx (the caller's Scope).
void prepare_A(Context& ctx, const SelectiveScan& op, ScanPlan& plan);
// The forward pass; where op.y is none it only fills op.saved, and op.state is left as it is.
void scan_forward(Context& ctx, const SelectiveScan& op, const ScanPlan& plan);

}  // namespace krait::cpu
