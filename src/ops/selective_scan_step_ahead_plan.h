// How the CUDA engine cuts a step of the scan with dt_proj inside (selective_scan_step_projected.h)
// for many channels of many sequences: pure functions of shapes.
#pragma once

#include "ops/selective_scan_plan.h"

namespace krait::cuda {

// One block a multiprocessor asks for more states ahead than many small ones, and finds the deltas
// of its sequences while memory is busy with these.
inline constexpr int kAheadRound = 32;     // sequences of a block whose deltas are found at once
inline constexpr int kAheadMaxRounds = 8;  // one after the other
inline constexpr int kAheadMaxChannels = 256;  // of a block
inline constexpr int kAheadTile = 16;          // channels of a warp
inline constexpr int kAheadMaxRing = 32;
inline constexpr int kAheadGap = 4;  // floats behind a sequence's deltas: no bank conflicts

// A block carries `channels` channels of up to `group_seqs` sequences, `seqs` of them at a time:
// `groups` groups of blocks have their own sequences, a group's `members` blocks their own
// channels. All blocks run at once.
struct ScanStepAheadPlan {
  bool usable = false;
  bool faster = false;  // than many small blocks
  int channels = 0, members = 0, group_seqs = 0, groups = 0;
  int seqs = 0;     // of a round
  int threads = 0;  // that compute; one warp more copies
  int ring = 0;     // sequences whose states are on their way to a block, or there
  int dt_row = 0;   // elements from row to row of dt in shared memory
  // Places in shared memory, in bytes; the ring lies in front.
  int delta = 0, u = 0, dt = 0, BC = 0, D = 0, slots = 0, barriers = 0, shared_bytes = 0;
  int state_bytes = 0;  // of a block's channels of a sequence
};

ScanStepAheadPlan plan_selective_scan_step_ahead(const ScanShape&, int64_t dt_rank,
                                                 int multiprocessors, int shared_bytes);

}  // namespace krait::cuda
