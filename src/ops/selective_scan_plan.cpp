#include "ops/selective_scan_plan.h"

#include <sstream>

#include "core/error.h"

namespace krait::cuda {
namespace {

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

ScanForwardPlan plan_selective_scan_fwd(const ScanShape& s, int multiprocessors) {
  ScanForwardPlan plan{};
  const int64_t schedulers = int64_t{4} * multiprocessors;  // each wants two warps and more
  const int64_t rows = s.d_inner * s.num_seqs;
  const auto layout = [&](int lanes, int lane_states, int channels) {
    plan.lanes = lanes, plan.lane_states = lane_states, plan.channels = channels;
  };
  if (s.d_state > 64) {
    layout(32, 8, 8);
  } else if (s.d_state > 16) {
    layout(16, 4, 16);
  } else {
    layout(8, 2, 16);
  }
  // Segments side by side cost every exp twice: only for too few warps, and never when no sequence
  // can be longer than a segment.
  const int64_t warps = quotient_up(rows * plan.lanes, 32);
  plan.segmented = s.tokens > kScanSegment * s.num_seqs && 4 * warps < 5 * schedulers;
  const int64_t pieces = plan.segmented ? scan_segment_slots(s.tokens, s.num_seqs) : s.num_seqs;
  if (s.d_state <= 16 && quotient_up(s.d_inner * pieces * 4, 32) >= 2 * schedulers)
    layout(4, 4, 32);
  plan.pieces = pieces;
  plan.group_blocks = quotient_up(s.d_inner / s.n_groups, plan.channels);
  plan.channel_blocks = s.n_groups * plan.group_blocks;
  plan.blocks = plan.pieces * plan.channel_blocks;
  if (plan.segmented) {
    plan.chain_blocks = s.num_seqs * quotient_up(s.d_inner * s.d_state, kChainThreads);
    plan.start_states = plan.pieces * s.d_inner * s.d_state;
    plan.delta_sums = plan.pieces * s.d_inner;
  }
  KRAIT_CHECK(plan.blocks <= kMaxGrid && plan.chain_blocks <= kMaxGrid, plan.to_string());
  return plan;
}

std::string ScanForwardPlan::to_string() const {
  std::ostringstream out;
  out << lanes << " lanes of " << lane_states << " states, " << channels << " channels a block, "
      << (segmented ? "segments" : "sequences") << " " << pieces << " x " << channel_blocks
      << " blocks";
  return out.str();
}

ScanStepPlan plan_selective_scan_step(const ScanShape& s) {
  ScanStepPlan plan{.lanes = 1, .threads = 128, .blocks = 0};
  while (plan.lanes < 32 && plan.lanes * 4 < s.d_state) plan.lanes *= 2;
  plan.blocks = quotient_up(s.num_seqs * s.d_inner * plan.lanes, plan.threads);
  KRAIT_CHECK(plan.blocks <= kMaxGrid, "sequences times channels: " + std::to_string(plan.blocks));
  return plan;
}

}  // namespace krait::cuda
