#include "ops/decoder_batch_plan.h"

#include <gtest/gtest.h>

namespace krait::cuda {
namespace {

constexpr DecoderBatchMachine kH100 = {{0, 132, 66, 43, 31, 24, 20, 16, 15}};
constexpr DecoderBatchMachine kSmall = {{0, 20, 9, 5, 3, 2, 2, 1, 1}};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void expect_whole(const DecoderBatchProduct& p, const DecoderBatchMachine& machine, int64_t rows,
                  int64_t inputs, int64_t num_seqs) {
  EXPECT_GE(p.seqs, num_seqs);
  EXPECT_LT(p.seqs, std::max<int64_t>(9, 2 * num_seqs));
  EXPECT_EQ(p.num_seqs, num_seqs);
  EXPECT_EQ(p.own_seqs(), ceil_div(num_seqs, p.split));
  // Every row is in one box, and no box is empty.
  EXPECT_GE(p.tiles * p.box_rows, rows);
  EXPECT_LT((p.tiles - 1) * p.box_rows, rows);
  EXPECT_LE(p.boxes * p.box_rows, p.groups * kDecoderBatchGroup);
  EXPECT_LE(p.groups, kDecoderBatchMaxGroups);
  // All blocks run at once.
  EXPECT_LE(p.tiles, machine.clusters[static_cast<size_t>(p.split)]);
  EXPECT_EQ(p.steps, ceil_div(inputs, kDecoderBatchStep));
  EXPECT_GE(p.steps, 2 * p.split);
  // Tiles begin at multiples of 1024 bytes, where the swizzle repeats.
  EXPECT_EQ(p.weight_bytes() % kDecoderBatchAlignment, 0);
  EXPECT_EQ(p.vector_bytes() % kDecoderBatchAlignment, 0);
  for (const int stages : {p.weight_stages, p.vector_stages}) {
    EXPECT_GE(stages, 2);
    EXPECT_LE(stages, kDecoderBatchMaxStages);
  }
  EXPECT_LE(p.shared_bytes(), kDecoderBatchSharedBytes);
}

TEST(DecoderBatchPlan, CoversEveryShapeItTakes) {
  int taken = 0;
  for (const DecoderBatchMachine& machine : {kH100, kSmall})
    for (const int64_t num_seqs : {1, 5, 8, 9, 16, 17, 100, 128})
      for (const int64_t d_model : {128, 200, 768, 1032, 2048, 2560, 4096})
        for (const int64_t d_inner : {256, 1280, 1536, 4096, 5120, 8192})
          for (const int state_bytes : {2, 4}) {
            SCOPED_TRACE(testing::Message() << num_seqs << " x " << d_model << " x " << d_inner
                                            << ", " << state_bytes);
            const DecoderBatchPlan plan =
                plan_decoder_batch({num_seqs, d_model, d_inner, state_bytes}, machine);
            if (!plan.usable) continue;
            ++taken;
            expect_whole(plan.in, machine, d_inner, d_model, num_seqs);
            expect_whole(plan.out, machine, d_model, d_inner, num_seqs);
            EXPECT_EQ(plan.in.boxes, 2);
            EXPECT_EQ(plan.out.boxes, 1);
          }
  EXPECT_GT(taken, 500);
}

TEST(DecoderBatchPlan, TakesThePublishedShapes) {
  for (const int64_t d_model : {768, 1024, 1536, 2048, 2560})
    for (const int64_t num_seqs : {5, 128})
      EXPECT_TRUE(plan_decoder_batch({num_seqs, d_model, 2 * d_model}, kH100).usable) << d_model;
  EXPECT_TRUE(plan_decoder_batch({128, 4096, 8192, 2}, kH100).usable);
}

TEST(DecoderBatchPlan, RefusesWhatTheKernelsCannot) {
  EXPECT_FALSE(plan_decoder_batch({129, 768, 1536}, kH100).usable);
  EXPECT_FALSE(plan_decoder_batch({0, 768, 1536}, kH100).usable);
  EXPECT_FALSE(plan_decoder_batch({8, 772, 1536}, kH100).usable);
  EXPECT_FALSE(plan_decoder_batch({8, 768, 1540}, kH100).usable);
  EXPECT_FALSE(plan_decoder_batch({128, 4096, 8192, 4}, kH100).usable);  // faster by the ops
  EXPECT_FALSE(plan_decoder_batch({8, 768, 64}, kH100).usable);          // one step of inputs
  EXPECT_FALSE(plan_decoder_batch({8, 2560, 40000}, kH100).usable);      // too many rows
  EXPECT_FALSE(plan_decoder_batch({8, 768, 1536}, {}).usable);           // no clusters
}

// Where it takes many, it takes any number below.
TEST(DecoderBatchPlan, WhatTakesManyTakesFewer) {
  int shapes = 0;
  for (const DecoderBatchMachine& machine : {kH100, kSmall})
    for (const int64_t d_model : {128, 200, 768, 1032, 2048, 2560, 4096})
      for (const int64_t d_inner : {256, 1280, 1536, 4096, 5120, 8192})
        for (const int state_bytes : {2, 4}) {
          const auto usable = [&](int64_t num_seqs) {
            return plan_decoder_batch({num_seqs, d_model, d_inner, state_bytes}, machine).usable;
          };
          int64_t most = kDecoderBatchMaxSeqs;
          while (most > 0 && !usable(most)) --most;
          shapes += most > 0;
          for (int64_t num_seqs = 1; num_seqs < most; ++num_seqs)
            EXPECT_TRUE(usable(num_seqs)) << num_seqs << " x " << d_model << " x " << d_inner;
        }
  EXPECT_GT(shapes, 50);
}

// A sequence's bits do not depend on how many there are.
TEST(DecoderBatchPlan, CutsTheInputsAlikeForAnyNumberOfSequences) {
  for (const int64_t d_model : {768, 2048, 2560}) {
    const DecoderBatchPlan few = plan_decoder_batch({5, d_model, 2 * d_model}, kH100),
                           many = plan_decoder_batch({128, d_model, 2 * d_model}, kH100);
    EXPECT_EQ(few.in.split, many.in.split);
    EXPECT_EQ(few.out.split, many.out.split);
    EXPECT_EQ(few.out.tiles, many.out.tiles);
  }
}

}  // namespace
}  // namespace krait::cuda
