#include "ops/decoder_cluster_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace krait::cuda {
namespace {

constexpr size_t kSharedBytes = 227 << 10;

DecoderShape shape(int64_t num_seqs, int64_t d_model, int64_t dt_rank, int64_t n_layer = 24) {
  return {.num_seqs = num_seqs,
          .n_layer = n_layer,
          .d_model = d_model,
          .d_inner = 2 * d_model,
          .d_state = 16,
          .d_conv = 4,
          .dt_rank = dt_rank,
          .vocab_size = 1000};
}

struct Range {
  int begin, bytes;
};

// What is in use at the same time does not overlap, and ends before the next thing.
void expect_apart(std::vector<Range> ranges, int end) {
  std::ranges::sort(ranges, {}, &Range::begin);
  for (size_t i = 0; i < ranges.size(); ++i) {
    EXPECT_EQ(ranges[i].begin % 16, 0);
    EXPECT_LE(ranges[i].begin + ranges[i].bytes, i + 1 < ranges.size() ? ranges[i + 1].begin : end);
  }
}

void expect_whole(const DecoderClusterPlan& p, const DecoderShape& s, int state_bytes,
                  int clusters) {
  EXPECT_LE(p.clusters, clusters);
  EXPECT_GE(p.passes, 1);
  EXPECT_LE(p.passes, kClusterMaxPasses);
  EXPECT_LE(int64_t{p.clusters} * p.passes, s.num_seqs);
  // Of each pass, whose sequences are as many or one less.
  EXPECT_GE(int64_t{p.clusters} * p.seqs, (s.num_seqs + p.passes - 1) / p.passes);
  EXPECT_EQ(p.channels * kClusterBlocks, s.d_inner);
  EXPECT_EQ(p.outputs * kClusterBlocks, s.d_model);
  EXPECT_GE(p.u_width, p.channels);
  EXPECT_GE(p.own_runs() * kClusterBlocks * 8, p.x_proj_rows * p.seqs);
  // Tiles, and stages, begin where the swizzle repeats.
  EXPECT_EQ(p.stage_bytes % kClusterAlignment, 0);
  EXPECT_EQ(p.channels % 8, 0);
  EXPECT_EQ(p.outputs % 8, 0);
  EXPECT_GE(p.stages, 3);
  EXPECT_LE(p.stages, kClusterMaxStages);
  EXPECT_EQ(kClusterOctet % p.state_seqs, 0);
  EXPECT_LE(p.state_seqs * p.channels * kClusterStates * state_bytes, p.stage_bytes);
  EXPECT_LE(static_cast<size_t>(p.shared.bytes + kClusterAlignment), kSharedBytes);

  const DecoderClusterShared& m = p.shared;
  const int ring = p.stages * p.stage_bytes, vectors = p.seqs * 2;
  const std::vector<Range> always = {
      {m.ring, ring},
      {m.D, p.channels * 4},
      {m.A, p.channels * kClusterStates * 4},
      {m.squares, kClusterBlocks * p.seqs * 4},
      {m.row_squares, p.seqs * p.outputs},
      {m.scale, p.seqs * 4},
      {m.residual, p.seqs * p.outputs * 4},
      {m.slots, p.seqs * 4},
      {m.barriers, 8 * (2 * kClusterMaxStages + 9 + kClusterMaxOctets)}};
  const Range x = {m.x, vectors * p.d_model}, y = {m.y, vectors * p.d_inner},
              conv = {m.conv, p.seqs * kClusterBefore * p.channels * state_bytes},
              sums = {m.sums, p.seqs * p.sums_pitch() * 4},
              dt_sums = {m.dt_sums, p.seqs * p.sums_pitch() * 4},
              out_sums = {m.out_sums, kClusterGroups * p.seqs * p.out_pitch() * 4},
              u = {m.u, vectors * p.u_width}, x_dbl = {m.x_dbl, vectors * p.x_proj_rows},
              parts = {m.parts, p.seqs * p.x_proj_rows * 4},
              steps = {m.steps, p.seqs * p.steps_pitch() * 8},
              uz = {m.uz, vectors * 2 * p.channels}, BC = {m.BC, vectors * 2 * kClusterStates},
              received = {m.received, kClusterBlocks * p.own_runs() * 32};
  // Which may still leave when all others of a layer have come.
  const Range x_sent = {m.x_sent, vectors * p.outputs}, y_sent = {m.y_sent, vectors * p.channels};
  const auto expect_beside = [&](std::initializer_list<Range> more) {
    std::vector<Range> all = always;
    all.insert(all.end(), more);
    expect_apart(all, m.bytes);
  };
  // The convolution; in_proj for z; dt_proj; towards the scan; the scan; out_proj; behind it.
  expect_beside({x, conv, sums, u, x_sent, y_sent});
  expect_beside({x, sums, u, x_dbl, parts, received, x_sent});
  expect_beside({dt_sums, sums, u, x_dbl});
  expect_beside({dt_sums, sums, u, x_dbl, steps, uz, BC});
  expect_beside({steps, uz, BC, y, y_sent});
  expect_beside({y, y_sent});
  expect_beside({x, conv, out_sums, x_sent, y_sent});
}

TEST(DecoderClusterPlan, CoversEveryShapeItTakes) {
  int taken = 0;
  for (const int clusters : {2, 7, 8})
    for (const int64_t num_seqs : {1, 5, 8, 57, 112, 128, 168, 169, 336, 672})
      for (const int64_t d_model : {128, 256, 384, 512, 768, 1024})
        for (const int64_t dt_rank : {8, 40, 48, 64, 72})
          for (const int state_bytes : {2, 4}) {
            SCOPED_TRACE(testing::Message()
                         << clusters << " clusters, " << num_seqs << " x " << d_model
                         << ", dt_rank " << dt_rank << ", " << state_bytes);
            const DecoderShape s = shape(num_seqs, d_model, dt_rank);
            const DecoderClusterPlan plan =
                plan_decoder_cluster(s, state_bytes, clusters, kSharedBytes);
            if (!plan.usable) continue;
            ++taken;
            expect_whole(plan, s, state_bytes, clusters);
          }
  EXPECT_GT(taken, 900);
  // Not twice as wide inside.
  for (const auto& [d_model, d_inner] : {std::pair{1024, 256}, {128, 1024}, {384, 1280}}) {
    DecoderShape s = shape(40, d_model, 16);
    s.d_inner = d_inner;
    SCOPED_TRACE(testing::Message() << d_model << " x " << d_inner);
    const DecoderClusterPlan plan = plan_decoder_cluster(s, 4, 2, kSharedBytes);
    ASSERT_TRUE(plan.usable);
    expect_whole(plan, s, 4, 2);
  }
}

TEST(DecoderClusterPlan, TakesSmallPublishedShapes) {
  for (const int64_t num_seqs : {5, 64, 128})
    EXPECT_TRUE(plan_decoder_cluster(shape(num_seqs, 768, 48), 4, 7, kSharedBytes).usable);
  for (const int64_t num_seqs : {5, 64, 112})
    EXPECT_TRUE(plan_decoder_cluster(shape(num_seqs, 1024, 64, 48), 4, 7, kSharedBytes).usable);
}

// What finds no room at once.
TEST(DecoderClusterPlan, TakesManySequencesInPasses) {
  const auto passes = [](int64_t num_seqs, int64_t d_model = 768, int state_bytes = 4) {
    const DecoderClusterPlan p =
        plan_decoder_cluster(shape(num_seqs, d_model, d_model / 16), state_bytes, 7, kSharedBytes);
    return p.usable ? p.passes : 0;
  };
  EXPECT_EQ(passes(168), 1);
  EXPECT_EQ(passes(169), 2);
  EXPECT_EQ(passes(336), 2);
  EXPECT_EQ(passes(337), 3);
  EXPECT_EQ(passes(672), 4);
  EXPECT_EQ(passes(673), 0);
  EXPECT_EQ(passes(336, 768, 2), 2);
  EXPECT_EQ(passes(337, 768, 2), 0);
  // Not where a pass has room for less.
  EXPECT_EQ(passes(112, 1024), 1);
  for (const int64_t num_seqs : {113, 169, 224}) EXPECT_EQ(passes(num_seqs, 1024), 0);
}

TEST(DecoderClusterPlan, WhatTakesManyTakesFewer) {
  for (const int64_t d_model : {128, 384, 768, 1024})
    for (const int state_bytes : {2, 4}) {
      const auto usable = [&](int64_t num_seqs) {
        return plan_decoder_cluster(shape(num_seqs, d_model, 48), state_bytes, 7, kSharedBytes)
            .usable;
      };
      int64_t most = 7 * kClusterMaxPasses * kClusterMaxSeqs;
      while (most > 0 && !usable(most)) --most;
      EXPECT_GT(most, 100) << d_model;
      for (int64_t num_seqs = 1; num_seqs < most; ++num_seqs)
        EXPECT_TRUE(usable(num_seqs)) << num_seqs << " x " << d_model << ", " << state_bytes;
    }
}

TEST(DecoderClusterPlan, RefusesWhatTheKernelCannot) {
  const auto refused = [](const DecoderShape& s, int clusters = 7,
                          size_t shared_bytes = kSharedBytes) {
    return !plan_decoder_cluster(s, 4, clusters, shared_bytes).usable;
  };
  const DecoderShape good = shape(64, 768, 48);
  EXPECT_FALSE(refused(good));
  const auto changed = [&](auto change) {
    DecoderShape s = good;
    change(s);
    return s;
  };
  EXPECT_TRUE(refused(changed([](auto& s) { s.num_seqs = 0; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.num_seqs = 4 * 7 * kClusterMaxSeqs + 1; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.n_layer = kClusterMaxLayers + 1; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.d_model = 776; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.d_model = 1152; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.d_inner = 1408; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.d_inner = 3328; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.int8 = true; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.d_state = 8; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.d_conv = 3; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.dt_rank = 44; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.dt_rank = 0; })));
  EXPECT_TRUE(refused(changed([](auto& s) { s.dt_rank = 168; })));
  EXPECT_TRUE(refused(shape(128, 1024, 64, 48)));  // no room for a ring
  EXPECT_TRUE(refused(good, 0));
  EXPECT_TRUE(refused(good, 7, 100 << 10));
}

}  // namespace
}  // namespace krait::cuda
