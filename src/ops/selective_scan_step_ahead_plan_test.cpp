#include "ops/selective_scan_step_ahead_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

namespace krait::cuda {
namespace {

constexpr int kMultiprocessors = 132, kShared = 227 << 10;  // an H200's

ScanStepAheadPlan plan_of(int64_t num_seqs, int64_t d_inner, int64_t dt_rank, int state_bytes,
                          int multiprocessors = kMultiprocessors, int shared_bytes = kShared) {
  return plan_selective_scan_step_ahead({.tokens = num_seqs,
                                         .num_seqs = num_seqs,
                                         .d_inner = d_inner,
                                         .d_state = 16,
                                         .n_groups = 1,
                                         .state_bytes = state_bytes},
                                        dt_rank, multiprocessors, shared_bytes);
}

void expect_whole(const ScanStepAheadPlan& p, int64_t num_seqs, int64_t d_inner,
                  int multiprocessors, int shared_bytes, int state_bytes) {
  // Every sequence and channel has one block, all blocks run at once, none is empty.
  EXPECT_GE(p.groups * p.group_seqs, num_seqs);
  EXPECT_LT((p.groups - 1) * p.group_seqs, num_seqs);
  EXPECT_GE(p.members * p.channels, d_inner);
  EXPECT_LT((p.members - 1) * p.channels, d_inner);
  EXPECT_LE(p.groups * p.members, multiprocessors);
  EXPECT_GE(p.seqs, 1);
  EXPECT_LE(p.seqs, kAheadRound);
  EXPECT_EQ(p.channels % kAheadTile, 0);
  EXPECT_LE(p.channels, kAheadMaxChannels);
  EXPECT_EQ(p.threads, p.channels * 2);
  EXPECT_EQ(p.state_bytes, p.channels * 16 * state_bytes);
  EXPECT_LE(p.shared_bytes, shared_bytes);
  EXPECT_GE(p.ring, std::min(p.group_seqs, 2));
  EXPECT_LE(p.ring, std::min(p.group_seqs, kAheadMaxRing));
  EXPECT_EQ(p.dt_row % 64, 32);
}

TEST(ScanStepAheadPlan, CoversEveryShapeItTakes) {
  int taken = 0;
  for (const auto& [multiprocessors, shared_bytes] :
       {std::pair{kMultiprocessors, kShared}, {20, 160 << 10}})
    for (const int64_t num_seqs : {1, 2, 3, 5, 16, 17, 33, 100, 128, 129, 192, 257, 1000, 1024})
      for (const int64_t d_inner : {64, 256, 1088, 1536, 4096, 5120, 8192})
        for (const int64_t dt_rank : {16, 48, 128, 160, 256})
          for (const int state_bytes : {2, 4}) {
            SCOPED_TRACE(testing::Message() << num_seqs << " x " << d_inner << ", rank " << dt_rank
                                            << ", " << state_bytes);
            const ScanStepAheadPlan plan =
                plan_of(num_seqs, d_inner, dt_rank, state_bytes, multiprocessors, shared_bytes);
            if (!plan.usable) continue;
            ++taken;
            EXPECT_GE(plan.dt_row, dt_rank);
            expect_whole(plan, num_seqs, d_inner, multiprocessors, shared_bytes, state_bytes);
          }
  EXPECT_GT(taken, 1000);
}

// As measured, on a GPU of 132 multiprocessors.
TEST(ScanStepAheadPlan, IsForManyChannelsOfManySequences) {
  for (const int64_t num_seqs : {128, 192, 256}) {
    EXPECT_EQ(plan_of(num_seqs, 4096, 128, 4).faster, num_seqs > 128);
    for (const int state_bytes : {2, 4}) {
      EXPECT_TRUE(plan_of(num_seqs, 5120, 160, state_bytes).faster);
      EXPECT_TRUE(plan_of(num_seqs, 8192, 256, state_bytes).faster);
    }
  }
  EXPECT_TRUE(plan_of(64, 5120, 160, 4).faster);
  EXPECT_TRUE(plan_of(64, 8192, 256, 4).faster);
  EXPECT_FALSE(plan_of(32, 8192, 256, 4).faster);
  EXPECT_FALSE(plan_of(64, 4096, 128, 4).faster);
  EXPECT_FALSE(plan_of(128, 4096, 128, 2).faster);
  EXPECT_FALSE(plan_of(512, 1536, 48, 4).faster);
}

TEST(ScanStepAheadPlan, RefusesWhatTheKernelCannot) {
  EXPECT_TRUE(plan_of(128, 8192, 256, 4).usable);
  EXPECT_FALSE(plan_of(128, 8192, 40, 4).usable);
  EXPECT_FALSE(plan_of(128, 8192, 272, 4).usable);
  EXPECT_FALSE(plan_of(128, 8208, 256, 4).usable);
  EXPECT_FALSE(plan_of(128, 16384, 256, 4).usable);  // too many channels for a block
  EXPECT_FALSE(plan_of(1025, 4096, 128, 4).usable);
  EXPECT_FALSE(plan_of(128, 4096, 128, 4, 3).usable);
  EXPECT_FALSE(plan_of(128, 8192, 256, 4, kMultiprocessors, 99 << 10).usable);
}

}  // namespace
}  // namespace krait::cuda
