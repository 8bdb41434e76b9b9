// The selective scan's backward pass for the shapes that models have: bf16, 16 states, channels by
// the 32, gated. Same contract as selective_scan_bwd, several times fewer instructions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/selective_scan.h"

namespace krait::cuda {

inline constexpr int kScanStreamsWarps = 4;
inline constexpr int kScanStreamsThreads = 32 * kScanStreamsWarps;
inline constexpr int kScanStreamsChannels = 8 * kScanStreamsWarps;  // of a block
inline constexpr int kScanStreamsStates = 16;
inline constexpr int kScanStreamsBlocks = 4;  // on a multiprocessor, of 128 registers a thread
inline constexpr int kScanStreamsChainThreads = 128;
// A longer sequence is walked in pieces of this many tokens, whatever else is in the batch: so its
// bits depend on nothing else. All but the last have a slot: piece j of sequence s has slot
// start_s / kScanStreamsPiece + j, all of them distinct.
inline constexpr int64_t kScanStreamsPiece = 2048;
// Where that makes too few blocks, pieces are walked in parts side by side, after a pass that finds
// what flows into each: the same bits.
inline constexpr int64_t kScanStreamsPart = 128;

struct ScanStreamsPlan {
  int64_t blocks;         // grid.x: of channels, over all groups
  int64_t slots;          // of pieces behind which there is another one
  int64_t pieces;         // last pieces, and slots
  int64_t piece_walkers;  // grid.y of the passes that come first
  bool parts;
  int64_t part_slots;    // 0 without parts
  int64_t walkers;       // grid.y: block y takes pieces (or parts) y, y + walkers, ..
  int64_t chain_blocks;  // of the kernel that chains pieces; 0 if no sequence can have many
};

inline ScanStreamsPlan plan_scan_streams(int64_t tokens, int64_t num_seqs, int64_t d_inner,
                                         int multiprocessors) {
  ScanStreamsPlan plan{};
  plan.blocks = d_inner / kScanStreamsChannels;
  plan.slots = tokens / kScanStreamsPiece;
  plan.pieces = num_seqs + plan.slots;
  // Sums over tokens (dA, dD, ddt_bias) are kept per walker: one for each piece, but no more than
  // deal out the work evenly.
  constexpr int64_t kWaves = 16, kMaxGridY = 65535;
  const int64_t enough =
      std::min(kMaxGridY, kWaves * kScanStreamsBlocks * multiprocessors / plan.blocks + 1);
  plan.piece_walkers = std::clamp<int64_t>(plan.pieces, 1, enough);
  plan.walkers = plan.piece_walkers;
  const int64_t likely_pieces = std::max(num_seqs, plan.slots);
  plan.parts =
      plan.blocks * likely_pieces * 2 < 3 * multiprocessors && tokens > kScanStreamsPart * num_seqs;
  if (plan.parts) {
    constexpr int64_t kParts = kScanStreamsPiece / kScanStreamsPart;
    plan.part_slots = num_seqs + tokens / kScanStreamsPart;
    plan.walkers = std::clamp<int64_t>(plan.pieces * kParts, 1, enough);
  }
  if (tokens > kScanStreamsPiece)
    plan.chain_blocks =
        plan.slots * ((d_inner * kScanStreamsStates - 1) / kScanStreamsChainThreads + 1);
  return plan;
}

// Whether shapes, strides and alignments are such.
bool scan_streams_apply(const SelectiveScan&, const SelectiveScanGrad&);
// op.saved is there.
void selective_scan_bwd_streams(Context&, const SelectiveScan& op, const SelectiveScanGrad& grad);

}  // namespace krait::cuda
