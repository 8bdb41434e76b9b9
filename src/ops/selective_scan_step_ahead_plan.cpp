#include "ops/selective_scan_step_ahead_plan.h"

#include <algorithm>

namespace krait::cuda {
namespace {

constexpr int kMaxGroups = 4;  // of which each block has many channels, and as many warps
// Less than so many (channel, sequence) pairs a multiprocessor, where a block has few channels or
// states are in bf16 more, or so many channels a block, or a shorter ring, and many small blocks
// are as fast or faster.
constexpr int kLeastPairs = 2400, kLeastPairsElse = 4600, kManyChannels = 160;
constexpr int kLeastChannels = 96, kLeastRing = 3;

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int round_up(int64_t a, int b) { return static_cast<int>(quotient_up(a, b) * b); }

// Where everything lies in a block's shared memory, and a ring as long as there is room.
void place(ScanStepAheadPlan& p, int shared_bytes) {
  int end = 0;
  const auto take = [&](int bytes) {
    const int at = end;
    end += round_up(bytes, 16);
    return at;
  };
  p.delta = take(p.seqs * (p.channels + kAheadGap) * 4);
  p.u = take(p.seqs * p.channels * 2);
  p.dt = take(round_up(p.seqs, 8) * p.dt_row * 2);
  p.BC = take(p.seqs * 2 * kProjectedStates * 4);
  p.D = take(p.channels * 4);
  p.slots = take(p.group_seqs * 4);
  p.barriers = take(2 * kAheadMaxRing * 8);
  const int longest = std::min(p.group_seqs, kAheadMaxRing);
  p.ring = std::clamp((shared_bytes - end) / p.state_bytes, 0, longest);
  const int ring_bytes = p.ring * p.state_bytes;
  for (int* at : {&p.delta, &p.u, &p.dt, &p.BC, &p.D, &p.slots, &p.barriers}) *at += ring_bytes;
  p.shared_bytes = ring_bytes + end;
}

}  // namespace

ScanStepAheadPlan plan_selective_scan_step_ahead(const ScanShape& s, int64_t dt_rank,
                                                 int multiprocessors, int shared_bytes) {
  ScanStepAheadPlan p;
  if (!scan_step_projects_shape(s, dt_rank) || s.num_seqs < 1 ||
      s.num_seqs > kMaxGroups * kAheadRound * kAheadMaxRounds ||
      s.d_inner > int64_t{kAheadMaxChannels} * multiprocessors)
    return p;
  p.groups = static_cast<int>(std::min<int64_t>(kMaxGroups, s.num_seqs));
  if (multiprocessors < p.groups) return p;
  p.group_seqs = static_cast<int>(quotient_up(s.num_seqs, p.groups));
  p.groups = static_cast<int>(quotient_up(s.num_seqs, p.group_seqs));
  p.seqs = static_cast<int>(quotient_up(p.group_seqs, quotient_up(p.group_seqs, kAheadRound)));
  p.channels = round_up(quotient_up(s.d_inner, multiprocessors / p.groups), kAheadTile);
  if (p.channels > kAheadMaxChannels) return p;
  p.members = static_cast<int>(quotient_up(s.d_inner, p.channels));
  p.threads = p.channels / kAheadTile * 32;
  // Rows start 64 bytes apart modulo 128: the eight lanes that read together meet no conflict.
  p.dt_row = round_up(dt_rank + 32, 64) - 32;
  p.state_bytes = p.channels * kProjectedStates * s.state_bytes;
  place(p, shared_bytes);
  p.usable = p.ring >= std::min(p.group_seqs, 2);
  const bool soon = s.state_bytes == 4 && p.channels >= kManyChannels;
  const int64_t least = soon ? kLeastPairs : kLeastPairsElse;
  p.faster = p.usable && p.channels >= kLeastChannels && p.ring >= kLeastRing &&
             s.num_seqs * s.d_inner >= least * multiprocessors;
  return p;
}

}  // namespace krait::cuda
