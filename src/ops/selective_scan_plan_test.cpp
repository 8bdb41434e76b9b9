#include "ops/selective_scan_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "core/error.h"

namespace krait::cuda {
namespace {

constexpr int kMultiprocessors[] = {1, 16, 132};

std::vector<ScanShape> shapes() {
  std::vector<ScanShape> all;
  for (int64_t d_inner : {1, 3, 16, 33, 1024, 1536, 5120, 1 << 20})
    for (int64_t d_state : {1, 2, 15, 16, 17, 64, 65, 128, 129, 256})
      for (int64_t num_seqs : {1, 2, 8, 1000})
        for (int64_t length : {1, 31, 2048, 2049, 8192, (1 << 20) + 1})
          if (d_inner * num_seqs * length <= int64_t{1} << 41)
            all.push_back({length * num_seqs, num_seqs, d_inner, d_state, 1});
  all.push_back({.tokens = 700, .num_seqs = 3, .d_inner = 24, .d_state = 16, .n_groups = 8});
  all.push_back({.tokens = 5, .num_seqs = 9, .d_inner = 4, .d_state = 16, .n_groups = 4});
  return all;
}

TEST(SelectiveScanPlan, CoversEveryChannelAndState) {
  for (const ScanShape& s : shapes())
    for (int multiprocessors : kMultiprocessors) {
      const ScanForwardPlan plan = plan_selective_scan_fwd(s, multiprocessors);
      SCOPED_TRACE(plan.to_string());
      ASSERT_GE(plan.lanes * plan.lane_states, s.d_state);
      ASSERT_GE(plan.group_blocks * plan.channels, s.d_inner / s.n_groups);
      ASSERT_EQ(plan.channel_blocks, plan.group_blocks * s.n_groups);
      ASSERT_EQ(plan.blocks, plan.pieces * plan.channel_blocks);
      ASSERT_GE(plan.relay_group_blocks * kScanRelayChannels, s.d_inner / s.n_groups);
      ASSERT_EQ(plan.relay_channel_blocks, plan.relay_group_blocks * s.n_groups);
      ASSERT_GE(plan.pieces, s.num_seqs);
    }
}

TEST(SelectiveScanPlan, KeepsTheGpusLimits) {
  for (const ScanShape& s : shapes())
    for (int multiprocessors : kMultiprocessors) {
      const ScanForwardPlan plan = plan_selective_scan_fwd(s, multiprocessors);
      SCOPED_TRACE(plan.to_string());
      ASSERT_LE(plan.threads(), 1024);
      ASSERT_EQ(plan.threads() % 32, 0);
      ASSERT_LT(plan.blocks, int64_t{1} << 31);
      ASSERT_LT(plan.chain_blocks, int64_t{1} << 31);
    }
}

TEST(SelectiveScanPlan, RefusesMoreBlocksThanAGridHas) {
  const ScanShape s = {
      .tokens = 1 << 30, .num_seqs = 1 << 30, .d_inner = 4096, .d_state = 16, .n_groups = 1};
  EXPECT_THROW(plan_selective_scan_fwd(s, 132), CheckFailure);
  EXPECT_THROW(plan_selective_scan_step(s, 132), CheckFailure);
}

// Scratch memory grows with tokens x d_inner, and is none where nothing is cut.
TEST(SelectiveScanPlan, ScratchMemoryIsLinear) {
  for (const ScanShape& s : shapes())
    for (int multiprocessors : kMultiprocessors) {
      const ScanForwardPlan plan = plan_selective_scan_fwd(s, multiprocessors);
      SCOPED_TRACE(plan.to_string());
      ASSERT_EQ(plan.start_states > 0, plan.segmented);
      ASSERT_LE(plan.start_states, (s.tokens / kScanSegment + s.num_seqs) * s.d_inner * s.d_state);
      ASSERT_FALSE(plan.segmented && s.tokens <= kScanSegment);
    }
}

TEST(SelectiveScanPlan, SegmentsHaveSlotsOfTheirOwn) {
  constexpr int64_t k = kScanSegment;
  const std::vector<int64_t> lengths = {0, 1, k - 1, k,     k + 1, 0, 0, 2 * k, 2 * k + 1, 20000,
                                        1, 1, 1,     3 * k, 4 * k, 3, k, k,     0};
  int64_t start = 0, next = 0, tokens = 0;
  for (int64_t l : lengths) tokens += l;
  for (size_t s = 0; s < lengths.size(); ++s) {
    const int64_t first = scan_segment_slots(start, static_cast<int64_t>(s));
    EXPECT_GE(first, next);
    next = first + std::max<int64_t>(1, (lengths[s] + kScanSegment - 1) / kScanSegment);
    start += lengths[s];
  }
  EXPECT_LE(next, scan_segment_slots(tokens, static_cast<int64_t>(lengths.size())));
}

TEST(SelectiveScanPlan, CutsAlongTimeOnlyWhereSequencesAreFew) {
  const auto segmented = [](int64_t num_seqs, int64_t d_inner, int64_t length) {
    return plan_selective_scan_fwd({num_seqs * length, num_seqs, d_inner, 16, 1}, 132).segmented;
  };
  EXPECT_TRUE(segmented(1, 1024, 1 << 20));
  EXPECT_TRUE(segmented(1, 256, 1 << 20));
  EXPECT_TRUE(segmented(1, 4096, 32768));
  EXPECT_FALSE(segmented(1, 1536, 128));
  EXPECT_FALSE(segmented(1, 1536, 4096));
  EXPECT_FALSE(segmented(8, 5120, 2048));
  EXPECT_FALSE(segmented(32, 1536, 2048));
}

TEST(SelectiveScanPlan, WarpsTakeTurnsOnlyWhereChannelsAreFew) {
  const auto relay = [](int64_t num_seqs, int64_t d_inner, int64_t length, int64_t d_state) {
    return plan_selective_scan_fwd({num_seqs * length, num_seqs, d_inner, d_state, 1}, 132).relay;
  };
  EXPECT_TRUE(relay(1, 1536, 2048, 16));
  EXPECT_TRUE(relay(8, 128, 256, 16));
  EXPECT_FALSE(relay(8, 1024, 2048, 16));
  EXPECT_FALSE(relay(1, 1536, 32768, 16));  // segments side by side
  EXPECT_FALSE(relay(1, 1536, 2048, 17));
  ScanShape silent = {.tokens = 8000, .num_seqs = 1, .d_inner = 1536, .d_state = 16, .n_groups = 1};
  EXPECT_TRUE(plan_selective_scan_fwd(silent, 132).relay);
  silent.output = false;
  EXPECT_TRUE(plan_selective_scan_fwd(silent, 132).segmented);
  ScanShape narrow = {.tokens = 100, .num_seqs = 1, .d_inner = 33, .d_state = 16, .n_groups = 3};
  narrow.row_vector = 1;
  EXPECT_FALSE(plan_selective_scan_fwd(narrow, 132).relay);
}

TEST(SelectiveScanPlan, ScansThatRunBesideCountAsSequences) {
  const auto plan_of = [](int64_t num_seqs, int beside) {
    return plan_selective_scan_fwd({.tokens = 2048 * num_seqs,
                                    .num_seqs = num_seqs,
                                    .d_inner = 4096,
                                    .d_state = 16,
                                    .n_groups = 1,
                                    .beside = beside},
                                   132);
  };
  EXPECT_TRUE(plan_of(1, 1).relay);
  for (const int count : {2, 4, 8}) {
    EXPECT_FALSE(plan_of(1, count).relay) << count;
    EXPECT_EQ(plan_of(1, count).lanes, plan_of(count, 1).lanes) << count;
    EXPECT_EQ(plan_of(1, count).blocks * count, plan_of(count, 1).blocks) << count;
  }
}

TEST(SelectiveScanPlan, StagesAreForFewLongSequences) {
  const auto stage = [](int64_t num_seqs, int64_t length, int64_t d_inner, int64_t d_state = 16) {
    return scan_stage_tokens({num_seqs * length, num_seqs, d_inner, d_state, 1}, 132);
  };
  EXPECT_EQ(stage(1, 32768, 4096), 4096);
  EXPECT_EQ(stage(1, 20000, 4096), 4032);  // five alike, of whole saved chunks
  EXPECT_EQ(stage(1, 16383, 4096), 2048);
  EXPECT_EQ(stage(2, 16384, 4096), 4096);
  EXPECT_EQ(stage(4, 8192, 1536), 2048);
  EXPECT_EQ(stage(1, 8191, 4096), 8191);  // too few to run beside each other
  EXPECT_EQ(stage(8, 2048, 4096), 8 * 2048);
  EXPECT_EQ(stage(8, 2048, 64), 8 * 2048);   // stages are no narrower than sequences
  EXPECT_EQ(stage(1, 32768, 32768), 32768);  // fills the GPU as it is
  EXPECT_EQ(stage(1, 32768, 5120, 64), 4096);
  EXPECT_EQ(stage(1, 32768, 5120, 128), 32768);
  EXPECT_EQ(stage(32768, 1, 16), 32768);
  for (const ScanShape& s : shapes())
    for (int multiprocessors : kMultiprocessors) {
      const int64_t tokens = scan_stage_tokens(s, multiprocessors);
      ASSERT_TRUE(tokens == s.tokens || (tokens <= kLongScanStage && tokens % kScanChunk == 0));
    }
}

// A block of two lanes has no neighbour to hide its waits; two of four lanes are faster.
TEST(SelectiveScanPlan, NoBlockOfTwoLanesIsAlone) {
  const auto channels = [](int64_t num_seqs, int64_t d_inner) {
    return plan_selective_scan_fwd({num_seqs * 2048, num_seqs, d_inner, 16, 1}, 132).channels;
  };
  EXPECT_EQ(channels(8, 1024), 32);
  EXPECT_EQ(channels(64, 128), 32);
  EXPECT_EQ(channels(8, 2048), 64);
  EXPECT_EQ(channels(8, 5120), 64);
}

TEST(SelectiveScanPlan, StepCoversEveryChannelAndSequence) {
  for (int64_t d_state : {1, 4, 5, 16, 64, 100, 256})
    for (int64_t num_seqs : {1, 7, 128, 131072}) {
      const ScanStepPlan plan =
          plan_selective_scan_step({num_seqs, num_seqs, 333, d_state, 1}, 132);
      EXPECT_GE(plan.channel_blocks * kStepThreads, 333 * plan.lanes);
      EXPECT_GE(plan.sequence_blocks * plan.sequences, num_seqs);
      EXPECT_LE(plan.sequence_blocks, 65535);
      EXPECT_EQ(32 % plan.lanes, 0);
    }
}

TEST(SelectiveScanPlan, StepWithItsProductCoversEveryChannelAndSequence) {
  for (int64_t d_inner : {32, 1536, 4096, 8192})
    for (int64_t num_seqs : {1, 7, 8, 33, 128, 500000})
      for (int state_bytes : {2, 4}) {
        ScanShape shape = {num_seqs, num_seqs, d_inner, 16, 1};
        shape.state_bytes = state_bytes;
        ASSERT_EQ(scan_step_projects_shape(shape, 128), state_bytes == 4 || d_inner > 32);
        if (d_inner == 32 && state_bytes == 2) continue;
        const ScanStepProjectedPlan plan = plan_selective_scan_step_projected(shape, 132);
        EXPECT_EQ(plan.channel_blocks * (state_bytes == 4 ? 32 : 64), d_inner);
        EXPECT_GE(plan.sequence_blocks * plan.sequences, num_seqs);
        EXPECT_LT((plan.sequence_blocks - 1) * plan.sequences, num_seqs);
        EXPECT_LE(plan.sequence_blocks, 65535);
      }
  ScanShape shape = {128, 128, 4096, 16, 1};
  EXPECT_EQ(plan_selective_scan_step_projected(shape, 132).sequences, 32);
  EXPECT_EQ(plan_selective_scan_step_projected(shape, 132).blocks, 4);
  shape.d_inner = 8192;
  EXPECT_EQ(plan_selective_scan_step_projected(shape, 132).blocks, 8);
  shape.state_bytes = 2;
  EXPECT_EQ(plan_selective_scan_step_projected(shape, 132).sequences, 16);
  EXPECT_EQ(plan_selective_scan_step_projected(shape, 132).blocks, 4);
  shape.num_seqs = shape.tokens = 8;
  EXPECT_EQ(plan_selective_scan_step_projected(shape, 132).sequences, 8);
  EXPECT_EQ(plan_selective_scan_step_projected({8, 8, 4096, 16, 1}, 132).sequences, 8);
  EXPECT_FALSE(scan_step_projects_shape({8, 8, 48, 16, 1}, 128));
  EXPECT_FALSE(scan_step_projects_shape({8, 8, 64, 8, 1}, 128));
  EXPECT_FALSE(scan_step_projects_shape({8, 8, 64, 16, 2}, 128));
  EXPECT_FALSE(scan_step_projects_shape({8, 8, 64, 16, 1}, 20));
  EXPECT_FALSE(scan_step_projects_shape({8, 8, 64, 16, 1}, 272));
}

// Three of four segments have an end that somebody starts from: three blocks for each
// multiprocessor instead of one or two.
TEST(SelectiveScanPlan, EndsOfSegmentsHaveALayoutOfTheirOwn) {
  ScanShape shape = {8192, 1, 4096, 16, 1};
  EXPECT_EQ(plan_selective_scan_fwd(shape, 132).channels, 64);
  shape.ends = true;
  const ScanForwardPlan ends = plan_selective_scan_fwd(shape, 132);
  EXPECT_TRUE(ends.segmented);
  EXPECT_EQ(ends.channels, 32);
}

}  // namespace
}  // namespace krait::cuda
