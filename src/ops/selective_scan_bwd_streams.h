// The selective scan's backward pass for the shapes that models have: bf16, gated, 16 states and
// channels by the 32, or 32, 64 or 128 states and channels by the 16. Same contract as
// selective_scan_bwd, several times fewer instructions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ops/selective_scan.h"

namespace krait::cuda {

inline constexpr int kScanStreamsStates = 16;    // of a warp
inline constexpr int kScanStreamsChannels = 16;  // of a warp
// Of a block at 16 states: its warps have channels of their own, share B, C and add up dB, dC. With
// more states the warps of a block share its 16 channels.
inline constexpr int kScanStreamsMaxWarps = 4;
inline constexpr int kScanStreamsWarpsPerMultiprocessor = 8;  // of 255 registers a thread
inline constexpr int kScanStreamsCarryThreads = 256;          // one for each channel and state
inline constexpr int kScanStreamsCarryBlocks = 3;             // on a multiprocessor
inline constexpr int kScanStreamsChainThreads = 128;
// A longer sequence is walked in pieces of this many tokens, whatever else is in the batch: so its
// bits depend on nothing else. All but the last have a slot: piece j of sequence s has slot
// start_s / kScanStreamsPiece + j, all of them distinct.
inline constexpr int64_t kScanStreamsPiece = 2048;
inline constexpr int64_t kScanStreamsTile = 64;  // parts are whole tiles

struct ScanStreamsShape {
  int64_t tokens, num_seqs, d_inner, n_groups, d_state = kScanStreamsStates;
  int max_warps =
      kScanStreamsMaxWarps;  // of a block at 16 states: half as many where shared memory is small
};

struct ScanStreamsPlan {
  int warps;              // of a block
  int64_t blocks;         // grid.x: of channels, over all groups
  int64_t group_blocks;   // of a group
  int64_t slots;          // of pieces behind which there is another one
  int64_t pieces;         // last pieces, and slots
  int64_t walkers;        // grid.y: block y takes pieces (or parts) y, y + walkers, ..
  int64_t carry_blocks;   // grid.x of the passes that come first: of channels and states
  int64_t carry_walkers;  // and their grid.y
  int64_t chain_blocks;   // of the kernel that chains pieces; 0 if no sequence can have many
  // Where pieces are too few they are walked in parts side by side, after a pass that finds what
  // flows into each: the same bits. Tokens of a part; 0: not.
  int64_t part;
  int64_t part_slots;
};

// About how long the walk takes in parts of that many tokens, in twentieths of the time for a token
// where all blocks are in use: a block alone on its multiprocessor takes two thirds of it.
// Beginning and ending a part costs as much as 32 tokens; finding what flows into parts, 8 % of the
// walk.
inline int64_t scan_streams_time(int64_t part, int64_t longest, int64_t walks, int64_t at_once,
                                 int64_t carry_rounds) {
  const int64_t parts = (longest + part - 1) / part, blocks = walks * parts,
                rest = blocks % at_once;
  const int64_t rounds = blocks / at_once * 20 + (rest == 0 ? 0 : rest * 2 <= at_once ? 13 : 20);
  return rounds * (part + 32) + (parts > 1 ? longest * carry_rounds * 6 / 5 : 0);
}

inline ScanStreamsPlan plan_scan_streams(const ScanStreamsShape& s, int multiprocessors) {
  constexpr int64_t kWaves = 16, kMaxGridY = 65535;
  ScanStreamsPlan plan{};
  const int64_t group_channels = s.d_inner / s.n_groups;
  const bool shared_channels = s.d_state > kScanStreamsStates;
  if (shared_channels)
    plan.warps = static_cast<int>(s.d_state / kScanStreamsStates);
  else if (group_channels % (kScanStreamsChannels * s.max_warps) == 0)
    plan.warps = s.max_warps;
  else
    plan.warps = kScanStreamsMaxWarps / 2;
  plan.group_blocks = group_channels / (kScanStreamsChannels * (shared_channels ? 1 : plan.warps));
  plan.blocks = plan.group_blocks * s.n_groups;
  plan.slots = s.tokens / kScanStreamsPiece;
  plan.pieces = s.num_seqs + plan.slots;
  plan.carry_blocks = s.d_inner * s.d_state / kScanStreamsCarryThreads;
  plan.carry_walkers = std::clamp<int64_t>(plan.pieces, 1, kMaxGridY);
  const int64_t at_once =
      int64_t{kScanStreamsWarpsPerMultiprocessor} * multiprocessors / plan.warps;
  const int64_t likely_pieces = std::max(s.num_seqs, plan.slots);
  const int64_t longest =
      std::min(kScanStreamsPiece, (s.tokens + likely_pieces - 1) / likely_pieces);
  const auto time = [&](int64_t part) {
    const int64_t carry_rounds =
        plan.carry_blocks * likely_pieces / (int64_t{kScanStreamsCarryBlocks} * multiprocessors) +
        1;
    return scan_streams_time(part, longest, plan.blocks * likely_pieces, at_once, carry_rounds);
  };
  int64_t best = time(std::max<int64_t>(longest, 1));
  for (int64_t part = kScanStreamsTile; part < longest; part *= 2)
    if (time(part) < best) best = time(part), plan.part = part;
  if (plan.part > 0) plan.part_slots = s.num_seqs + s.tokens / plan.part;
  // Sums over tokens (dA, dD, ddt_bias) are kept per walker: one for each piece, but no more than
  // deal out the work evenly.
  const int64_t parts = plan.part > 0 ? kScanStreamsPiece / plan.part : 1;
  plan.walkers = std::clamp<int64_t>(plan.pieces * parts, 1,
                                     std::min(kMaxGridY, kWaves * at_once / plan.blocks + 1));
  if (s.tokens > kScanStreamsPiece)
    plan.chain_blocks = plan.slots * ((s.d_inner * s.d_state - 1) / kScanStreamsChainThreads + 1);
  return plan;
}

// Whether shapes, strides and alignments are such, and a block fits into the shared memory.
bool scan_streams_apply(const SelectiveScan&, const SelectiveScanGrad&,
                        size_t shared_bytes_per_block);
// op.saved is there.
void selective_scan_bwd_streams(Context&, const SelectiveScan& op, const SelectiveScanGrad& grad);

}  // namespace krait::cuda
