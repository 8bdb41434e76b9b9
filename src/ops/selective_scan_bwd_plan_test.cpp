#include "ops/selective_scan_bwd_plan.h"

#include <gtest/gtest.h>

#include <vector>

#include "core/error.h"
#include "ops/selective_scan_bwd_streams.h"

namespace krait::cuda {
namespace {

constexpr ScanBwdDevice kH200 = {.multiprocessors = 132, .shared_bytes_per_block = 232448};
constexpr ScanBwdDevice kSmall = {.multiprocessors = 16, .shared_bytes_per_block = 101376};

std::vector<ScanBwdShape> shapes() {
  std::vector<ScanBwdShape> all;
  for (int64_t d_inner : {1, 3, 16, 33, 1024, 1536, 5120, 1 << 20})
    for (int64_t d_state : {1, 15, 16, 17, 64, 128, 256})
      for (int64_t num_seqs : {1, 2, 8, 1000, 100000})
        for (int64_t length : {1, 64, 1024, 1025, 2048, (1 << 20) + 1})
          for (size_t element_bytes : {2, 4})
            if (d_inner * num_seqs * length <= int64_t{1} << 41)
              all.push_back({length * num_seqs, num_seqs, d_inner, d_state, 1, element_bytes});
  all.push_back({700, 3, 24, 16, 8, 2});
  all.push_back({5, 9, 4, 16, 4, 4});
  return all;
}

TEST(SelectiveScanBwdPlan, CoversEveryChannelStateAndSequence) {
  for (const ScanBwdShape& s : shapes()) {
    const ScanBwdPlan plan = plan_selective_scan_bwd(s, kH200);
    SCOPED_TRACE(plan.to_string());
    ASSERT_GE(plan.padded_states, s.d_state);
    ASSERT_EQ(plan.padded_states % kScanBwdStates, 0);
    ASSERT_TRUE(plan.rounds == 1 || plan.rounds == kScanBwdPair);
    ASSERT_GE(plan.group_blocks * plan.rounds * kScanBwdUnit, s.d_inner / s.n_groups);
    ASSERT_LT((plan.group_blocks - 1) * plan.rounds * kScanBwdUnit, s.d_inner / s.n_groups);
    ASSERT_EQ(plan.blocks, plan.group_blocks * s.n_groups);
    ASSERT_EQ(plan.pieces, s.num_seqs + (plan.cut ? s.tokens / kScanBwdSegment : 0));
    ASSERT_GE(plan.walkers, 1);
  }
}

TEST(SelectiveScanBwdPlan, KeepsTheGpusLimits) {
  for (const ScanBwdShape& s : shapes())
    for (const ScanBwdDevice& device : {kH200, kSmall}) {
      if (s.d_state > 64 && device.shared_bytes_per_block < 200000) continue;
      const ScanBwdPlan plan = plan_selective_scan_bwd(s, device);
      SCOPED_TRACE(plan.to_string());
      ASSERT_LE(plan.shared_bytes, device.shared_bytes_per_block);
      ASSERT_LE(plan.walkers, 65535);
      ASSERT_LT(plan.blocks, int64_t{1} << 31);
      ASSERT_LT(plan.chain_blocks, int64_t{1} << 31);
    }
}

// What is kept per walker stays small however many sequences there are.
TEST(SelectiveScanBwdPlan, TinySequencesShareWalkers) {
  const ScanBwdPlan plan = plan_selective_scan_bwd({1000000, 1000000, 1024, 16, 1, 2}, kH200);
  EXPECT_LE(plan.walkers * plan.blocks, 64 * kH200.multiprocessors);
}

TEST(SelectiveScanBwdPlan, CutsOnlyWhereSequencesLeaveTheGpuIdle) {
  EXPECT_TRUE(plan_selective_scan_bwd({1 << 20, 1, 1024, 16, 1, 2}, kH200).cut);
  EXPECT_FALSE(plan_selective_scan_bwd({1 << 20, 8, 1024, 16, 1, 2}, kH200).cut);
  EXPECT_FALSE(plan_selective_scan_bwd({kScanBwdSegment, 1, 1024, 16, 1, 2}, kH200).cut);
}

// Two blocks fit on a multiprocessor with the model's shapes.
TEST(SelectiveScanBwdPlan, ModelsShapesLeaveRoomForTwoBlocks) {
  for (size_t element_bytes : {2, 4})
    for (int64_t num_seqs : {1, 8, 32}) {
      const ScanBwdPlan plan =
          plan_selective_scan_bwd({num_seqs * 2048, num_seqs, 1536, 16, 1, element_bytes}, kH200);
      EXPECT_LE(2 * (plan.shared_bytes + 1024), kH200.shared_bytes_per_block + 1024)
          << plan.to_string();
    }
}

TEST(SelectiveScanBwdPlan, RefusesWhatDoesNotFit) {
  EXPECT_THROW(plan_selective_scan_bwd({64, 1, 16, 256, 1, 2}, {16, 48 << 10}), Error);
}

// The shared memory's parts follow one another without overlap, each on 16 bytes.
TEST(SelectiveScanBwdPlan, SharedMemoryIsAligned) {
  for (int rounds : {1, kScanBwdPair})
    for (int states : {16, 32, 256})
      for (size_t element_bytes : {2, 4}) {
        const ScanBwdShared s = scan_bwd_shared(rounds, states, 2, element_bytes);
        int last = -1;
        for (int offset :
             {s.tile, s.first, s.A, s.carry, s.zero, s.behind, s.dA, s.sums, s.constants, s.bc}) {
          ASSERT_EQ(offset % 16, 0);
          ASSERT_GT(offset, last);
          last = offset;
        }
        ASSERT_EQ(s.tokens % 16, 0);
        ASSERT_GT(s.bytes, s.exchange);
      }
}

TEST(ScanStreamsPlan, CoversEveryPieceWithinTheGpusLimits) {
  for (const ScanBwdShape& s : shapes()) {
    const ScanStreamsShape shape = {s.tokens, s.num_seqs, s.d_inner, s.n_groups, s.d_state};
    const int64_t group_channels = s.d_inner / s.n_groups;
    if (group_channels % (2 * kScanStreamsChannels) != 0) continue;
    if (s.d_state != kScanStreamsStates && s.d_state != 32 && s.d_state != 64 && s.d_state != 128)
      continue;
    const ScanStreamsPlan plan = plan_scan_streams(shape, 132);
    SCOPED_TRACE(testing::Message() << s.tokens << " tokens, " << s.num_seqs << " sequences, "
                                    << s.d_inner << " channels");
    ASSERT_EQ(plan.blocks * plan.warps * kScanStreamsChannels * kScanStreamsStates,
              s.d_inner * s.d_state);
    ASSERT_EQ(plan.group_blocks * s.n_groups, plan.blocks);
    ASSERT_EQ(plan.carry_blocks * kScanStreamsCarryThreads, s.d_inner * s.d_state);
    ASSERT_EQ(plan.pieces, s.num_seqs + s.tokens / kScanStreamsPiece);
    ASSERT_EQ(plan.chain_blocks > 0, s.tokens > kScanStreamsPiece);
    ASSERT_EQ(plan.part_slots > 0, plan.part > 0);
    ASSERT_EQ((plan.whole < plan.pieces), (plan.part > 0));
    ASSERT_GE(plan.whole, 0);
    if (plan.part > 0) {
      ASSERT_EQ(kScanStreamsPiece % plan.part, 0);
      ASSERT_EQ(plan.part % kScanStreamsTile, 0);
    }
    for (int64_t walkers : {plan.walkers, plan.carry_walkers}) {
      ASSERT_GE(walkers, 1);
      ASSERT_LE(walkers, 65535);
    }
    for (int64_t blocks : {plan.blocks, plan.carry_blocks, plan.chain_blocks})
      ASSERT_LT(blocks, int64_t{1} << 31);
  }
}

// A block of four warps takes more shared memory than GPUs from 8.6 on have.
TEST(ScanStreamsPlan, KeepsToFewerWarpsWhereSharedMemoryIsSmall) {
  ScanStreamsShape shape = {.tokens = 2048, .num_seqs = 1, .d_inner = 1536, .n_groups = 1};
  EXPECT_EQ(plan_scan_streams(shape, 132).warps, kScanStreamsMaxWarps);
  shape.max_warps = 2;
  const ScanStreamsPlan plan = plan_scan_streams(shape, 132);
  EXPECT_EQ(plan.warps, 2);
  EXPECT_EQ(plan.blocks * plan.warps * kScanStreamsChannels, shape.d_inner);
}

// One short batch of few channels is cut finer, a full one is not.
TEST(ScanStreamsPlan, FewBlocksAreWalkedInParts) {
  EXPECT_GT(plan_scan_streams({2048, 1, 1536, 1}, 132).part, 0);
  EXPECT_EQ(plan_scan_streams({kScanStreamsTile, 1, 1536, 1}, 132).part, 0);
  EXPECT_EQ(plan_scan_streams({32 * 2048, 32, 1536, 1}, 132).part, 0);
}

// 320 blocks of whole pieces for 264 places: most stay whole, and what is left is cut for all.
TEST(ScanStreamsPlan, TheLastPiecesAreWalkedInPartsWherePlacesWouldRest) {
  const ScanStreamsPlan plan = plan_scan_streams({4 * 2048, 4, 5120, 1}, 132);
  EXPECT_EQ(plan.whole, 3);
  EXPECT_EQ(plan.part, 512);
}

}  // namespace
}  // namespace krait::cuda
