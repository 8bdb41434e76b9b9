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
  // Where pieces are too few, or leave multiprocessors idle at the end, those from number `whole`
  // on are walked in parts side by side, after a pass that finds what flows into each: the same
  // bits. Tokens of a part; 0: none is cut.
  int64_t part, whole;
  int64_t part_slots;
};

// About how long the walk takes when `whole` blocks take a piece of `longest` tokens each and `cut`
// more take parts of one, in twentieths of the time for a token where all blocks are in use: a
// block alone on its multiprocessor takes two thirds of it. Beginning and ending a piece or a part
// costs as much as 32 tokens; finding what flows into parts, a launch and a tenth of the walk or,
// where that has few blocks, its latency.
struct ScanStreamsWork {
  int64_t longest, part, whole, cut, at_once, carry_rounds;

  int64_t time() const {
    constexpr int64_t kEnds = 32, kLaunch = 190;
    const int64_t parts = cut > 0 ? (longest + part - 1) / part * cut : 0;
    const int64_t rest = whole % at_once, free = rest > 0 ? at_once - rest : 0;
    // What blocks do for which no whole piece is left, meanwhile.
    const int64_t beside = std::min(parts, free * ((longest + kEnds) / (part + kEnds)));
    const int64_t last = rest == 0        ? 0
                         : parts > beside ? 20
                                          : rounds(rest + (beside > 0 ? free : 0));
    return (whole / at_once * 20 + last) * (longest + kEnds) +
           rounds(parts - beside) * (part + kEnds) +
           (cut > 0 ? (longest - part) * (15 + 12 * carry_rounds) / 10 + kLaunch : 0);
  }

 private:
  int64_t rounds(int64_t blocks) const {
    const int64_t rest = blocks % at_once;
    return blocks / at_once * 20 + (rest == 0 ? 0 : rest * 2 <= at_once ? 13 : 20);
  }
};

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
  const auto time = [&](int64_t part, int64_t whole) {
    const int64_t cut = likely_pieces - whole;
    const int64_t carry_places = int64_t{kScanStreamsCarryBlocks} * multiprocessors;
    return ScanStreamsWork{longest,           part,    plan.blocks * whole,
                           plan.blocks * cut, at_once, plan.carry_blocks * cut / carry_places + 1}
        .time();
  };
  plan.whole = plan.pieces;
  int64_t best = time(std::max<int64_t>(longest, 1), likely_pieces);
  // As many whole pieces as fill all blocks some times, or nearly so; 2 % are not worth a launch.
  const int64_t full = likely_pieces * plan.blocks / at_once * at_once / plan.blocks;
  for (const int64_t whole : {int64_t{0}, full - 1, full, full + 1})
    for (int64_t part = kScanStreamsTile; part < longest; part *= 2)
      if (whole >= 0 && whole < likely_pieces &&
          (whole == 0 ? time(part, 0) < best : time(part, whole) * 50 < best * 49))
        best = time(part, whole), plan.part = part, plan.whole = whole;
  if (plan.part > 0) plan.part_slots = s.num_seqs + s.tokens / plan.part;
  // Sums over tokens (dA, dD, ddt_bias) are kept per walker: one for each piece, but no more than
  // deal out the work evenly.
  const int64_t parts = plan.part > 0 ? kScanStreamsPiece / plan.part : 1;
  plan.walkers = std::clamp<int64_t>(plan.whole + (plan.pieces - plan.whole) * parts, 1,
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
