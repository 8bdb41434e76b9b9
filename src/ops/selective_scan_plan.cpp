#include "ops/selective_scan_plan.h"

#include <algorithm>
#include <sstream>

#include "core/error.h"

namespace krait::cuda {
namespace {

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1, kMaxGridY = 65535;

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a channel, where warps are not few.
int natural_lanes(int64_t d_state) {
  return d_state <= 16 ? 4 : d_state <= 64 ? 8 : d_state <= 128 ? 16 : 32;
}

}  // namespace

ScanForwardPlan plan_selective_scan_fwd(const ScanShape& s, int multiprocessors) {
  ScanForwardPlan plan{};
  const int64_t schedulers = int64_t{4} * multiprocessors;
  const auto layout = [&](int lanes, int lane_states, int channels) {
    plan.lanes = lanes, plan.lane_states = lane_states, plan.channels = channels;
  };
  const auto warps = [&](int64_t pieces, int lanes) {
    return quotient_up(s.d_inner * pieces * lanes, 32);
  };
  plan.relay_group_blocks = quotient_up(s.d_inner / s.n_groups, kScanRelayChannels);
  plan.relay_channel_blocks = s.n_groups * plan.relay_group_blocks;
  // Where schedulers have few warps, either segments are scanned side
  // by side, which costs every exp twice, or warps take turns, which costs as much in other ways:
  // whichever comes nearer to two warps for each scheduler, or two blocks for each multiprocessor.
  const bool relay_can = s.output && s.d_state <= 16 && s.row_vector >= 2;
  const int lanes = natural_lanes(s.d_state);
  const int64_t uncut = warps(s.num_seqs * s.beside, lanes);
  const auto share = [](int64_t part, int64_t whole) {
    return std::min(1.0, static_cast<double>(part) / static_cast<double>(whole));
  };
  const double cut = share(warps(s.tokens / kScanSegment * s.beside, lanes), 2 * schedulers),
               in_turn = relay_can ? share(s.num_seqs * s.beside * plan.relay_channel_blocks,
                                           2 * multiprocessors)
                                   : 0.0;
  plan.segmented =
      s.tokens > kScanSegment * s.num_seqs && 4 * uncut < 7 * schedulers && cut >= in_turn;
  plan.relay = relay_can && !plan.segmented && 10 * uncut < 13 * schedulers;
  if (s.d_state > 128) {
    layout(32, 8, 8);
  } else if (s.d_state > 64) {
    layout(16, 8, 16);
  } else if (s.d_state > 16) {
    layout(8, 8, 16);
  } else {
    // The fewer lanes share a channel, the less is done twice, but every multiprocessor needs its
    // share of the blocks, and one block of two lanes alone is no faster than two of four lanes.
    // Speeds as measured; rows of two lanes are read four channels at a time, of four lanes two.
    int64_t busy = plan.segmented ? s.tokens / kScanSegment : s.num_seqs;
    if (s.ends) busy = std::max<int64_t>(1, busy - s.num_seqs);
    busy *= s.beside;
    const auto worth = [&](int channels, double speed, double alone) {
      const int64_t blocks = busy * s.n_groups * quotient_up(s.d_inner / s.n_groups, channels);
      const int64_t rounds = quotient_up(blocks, multiprocessors);
      return (rounds == 1 ? alone : speed) * static_cast<double>(blocks) /
             static_cast<double>(rounds * multiprocessors);
    };
    layout(8, 2, 16);
    const double eight = worth(16, 0.7, 0.7), four = worth(32, 1.0, 1.0), two = worth(64, 1.1, 1.0);
    if (s.row_vector >= 2 && four > eight) layout(4, 4, 32);
    if (s.row_vector >= 4 && two > std::max(four, eight)) layout(2, 8, 64);
  }
  const int64_t pieces = plan.segmented ? scan_segment_slots(s.tokens, s.num_seqs) : s.num_seqs;
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

int64_t scan_stage_tokens(const ScanShape& s, int multiprocessors) {
  const int64_t length = s.tokens / std::max<int64_t>(s.num_seqs, 1);
  const int64_t warps = quotient_up(s.d_inner * s.num_seqs * natural_lanes(s.d_state), 32);
  if (length < 4 * kScanSegment || s.d_inner < kNarrowestStages ||
      warps >= int64_t{16} * multiprocessors)
    return s.tokens;
  const int64_t most = length >= 4 * kLongScanStage ? kLongScanStage : kScanSegment;
  const int64_t count = quotient_up(s.tokens, most);
  return quotient_up(quotient_up(s.tokens, count), kScanChunk) * kScanChunk;
}

std::string ScanForwardPlan::to_string() const {
  std::ostringstream out;
  if (relay)
    out << "warps in turn, sequences " << pieces << " x " << relay_channel_blocks << " blocks";
  else
    out << lanes << " lanes of " << lane_states << " states, " << channels << " channels a block, "
        << (segmented ? "segments" : "sequences") << " " << pieces << " x " << channel_blocks
        << " blocks";
  return out.str();
}

ScanStepPlan plan_selective_scan_step(const ScanShape& s, int multiprocessors) {
  ScanStepPlan plan{.lanes = 1, .sequences = 1, .channel_blocks = 0, .sequence_blocks = 0};
  while (plan.lanes < 32 && plan.lanes * 4 < s.d_state) plan.lanes *= 2;
  plan.channel_blocks = quotient_up(s.d_inner * plan.lanes, kStepThreads);
  // Several sequences to a thread once that leaves eight blocks and more for each multiprocessor.
  if (plan.channel_blocks * s.num_seqs >= int64_t{8} * kStepSequences * multiprocessors ||
      s.num_seqs > kMaxGridY)
    plan.sequences = kStepSequences;
  plan.sequence_blocks = quotient_up(s.num_seqs, plan.sequences);
  KRAIT_CHECK(plan.sequence_blocks <= kMaxGridY,
              "sequences in a step: " + std::to_string(s.num_seqs));
  return plan;
}

bool scan_step_projects_shape(const ScanShape& s, int64_t dt_rank) {
  return s.n_groups == 1 && s.d_state == kProjectedStates &&
         s.d_inner % projected_channels(s.state_bytes) == 0 && dt_rank % 16 == 0 && dt_rank >= 16 &&
         dt_rank <= kProjectedMaxRank && s.num_seqs <= 8 * kMaxGridY;
}

ScanStepProjectedPlan plan_selective_scan_step_projected(const ScanShape& s, int multiprocessors) {
  ScanStepProjectedPlan plan{};
  plan.channel_blocks = s.d_inner / projected_channels(s.state_bytes);
  const int many_sequences = projected_many_sequences(s.state_bytes);
  // Many sequences to a block where that leaves three blocks for each multiprocessor; room for
  // eight where that makes more than four at once (of states in f32: in bf16 it is slower).
  const int64_t many = plan.channel_blocks * quotient_up(s.num_seqs, many_sequences);
  plan.sequences = many >= int64_t{3} * multiprocessors ? many_sequences : kProjectedFewSequences;
  const int64_t blocks = plan.channel_blocks * quotient_up(s.num_seqs, plan.sequences);
  plan.blocks = s.state_bytes == 4 && blocks > int64_t{4} * multiprocessors ? 8 : 4;
  plan.sequence_blocks = quotient_up(s.num_seqs, plan.sequences);
  return plan;
}

}  // namespace krait::cuda
