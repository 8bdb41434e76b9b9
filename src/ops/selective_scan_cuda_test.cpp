#include "ops/selective_scan_test.h"

namespace krait {
namespace {

using namespace scan_test;

// What the GPU's kernels branch on: tiles (32 tokens), saved states (64), segments (2048), channels
// of a block (8 to 64), states of a lane, vector loads or not.
const std::vector<Case>& cuda_cases() {
  static const std::vector<Case> all = {
      {.lengths = {63, 64, 65, 128, 1}, .d_inner = 33, .d_state = 16, .strided = true},
      {.lengths = {255, 256, 257, 0, 513}, .d_inner = 36, .d_state = 16},
      {.lengths = {1700}, .d_inner = 64, .d_state = 16, .n_groups = 2, .state = false},
      {.lengths = {1536, 3}, .d_inner = 20, .d_state = 7, .z = false, .strided = true},
      {.lengths = {600, 70}, .d_inner = 24, .d_state = 17, .n_groups = 3},
      {.lengths = {1100}, .d_inner = 12, .d_state = 128},
      {.lengths = {520, 30}, .d_inner = 40, .d_state = 256, .n_groups = 5, .D = false},
      {.lengths = std::vector<int>(300, 5), .d_inner = 48, .d_state = 16},
      {.lengths = {1023, 1024, 1025, 2049}, .d_inner = 17, .d_state = 16},
      {.lengths = {2047, 2048, 4095, 4096, 4097, 6145}, .d_inner = 12, .d_state = 16},
      {.lengths = {13000}, .d_inner = 16, .d_state = 16, .n_groups = 2},
      {.lengths = {6200, 9}, .d_inner = 6, .d_state = 64, .z = false},
      {.lengths = std::vector<int>(70, 64), .d_inner = 100, .d_state = 16, .dt_bias = false},
  };
  return all;
}

TEST(SelectiveScanCuda, ForwardMatchesTheReference) {
  op_test::on_cuda([](Context& ctx) {
    for (const auto* list : {&cases(), &cuda_cases()})
      for (const Case& c : *list)
        for (DType type : {DType::f32, DType::bf16}) {
          SCOPED_TRACE(::testing::PrintToString(c) + " " + name_of(type));
          expect_forward_like_reference(ctx, kCuda, c, type);
        }
  });
}

TEST(SelectiveScanCuda, StatesInBf16AreRoundedOnce) {
  // Segments side by side, warps in turn, blocks of whole sequences.
  const std::vector<Case> more = {
      {.lengths = {6200, 9}, .d_inner = 6, .d_state = 64, .z = false},
      {.lengths = {700}, .d_inner = 16, .d_state = 16},
      {.lengths = {600, 70}, .d_inner = 24, .d_state = 17},
      {.lengths = std::vector<int>(300, 5), .d_inner = 48, .d_state = 16}};
  op_test::on_cuda([&](Context& ctx) { expect_states_in_bf16(ctx, kCuda, {&cases(), &more}); });
}

TEST(SelectiveScanCuda, BackwardMatchesTheReference) {
  op_test::on_cuda([](Context& ctx) {
    for (const auto* list : {&cases(), &cuda_cases()})
      for (const Case& c : *list)
        for (DType type : {DType::f32, DType::bf16}) {
          SCOPED_TRACE(::testing::PrintToString(c) + " " + name_of(type));
          expect_backward_like_reference(ctx, kCuda, c, type, true);
          expect_backward_like_reference(ctx, kCuda, c, type, false);
          expect_gradients_in_place(ctx, c, type);
        }
  });
}

// What the backward pass of bf16 branches on: blocks of 32 and 64 channels; 16 states for each
// warp, or in all warps of a block 32, 64, 128; runs of 8 tokens; pieces of 2048 tokens, parts,
// both, neither.
TEST(SelectiveScanCuda, StreamsBackwardMatchesTheReference) {
  op_test::on_cuda([](Context& ctx) {
    for (const Case& c : std::vector<Case>{
             {.lengths = {8, 9, 15, 0, 1, 57}, .d_inner = 32, .d_state = 16, .D = false},
             {.lengths = {2170, 100, 4097}, .d_inner = 64, .d_state = 16},
             {.lengths = {300, 70, 1}, .d_inner = 64, .d_state = 16, .dt_bias = false},
             {.lengths = {2100, 130}, .d_inner = 96, .d_state = 16, .n_groups = 3},
             {.lengths = {150}, .d_inner = 128, .d_state = 16, .n_groups = 2, .state = false},
             {.lengths = std::vector<int>(200, 66), .d_inner = 64, .d_state = 16},
             {.lengths = {8, 9, 15, 0, 1, 57}, .d_inner = 16, .d_state = 64, .D = false},
             {.lengths = {2170, 100, 4097}, .d_inner = 32, .d_state = 64},
             {.lengths = {300, 70, 1}, .d_inner = 48, .d_state = 32, .dt_bias = false},
             {.lengths = {2100, 130}, .d_inner = 48, .d_state = 32, .n_groups = 3},
             {.lengths = {2100, 130}, .d_inner = 48, .d_state = 64, .n_groups = 3},
             {.lengths = {150}, .d_inner = 32, .d_state = 128, .n_groups = 2, .state = false},
             {.lengths = {64, 2049, 63}, .d_inner = 16, .d_state = 128},
             {.lengths = std::vector<int>(200, 66), .d_inner = 16, .d_state = 64}}) {
      SCOPED_TRACE(::testing::PrintToString(c));
      expect_backward_like_reference(ctx, kCuda, c, DType::bf16, true);
      expect_gradients_in_place(ctx, c, DType::bf16);
    }
  });
}

TEST(SelectiveScanCuda, LongSequencesKeepTheTolerance) {
  op_test::on_cuda([](Context& ctx) {
    expect_forward_like_reference(ctx, kCuda, {.lengths = {100001}, .d_inner = 8, .d_state = 16},
                                  DType::f32);
    expect_forward_like_reference(ctx, kCuda, {.lengths = {2048}, .d_inner = 640, .d_state = 16},
                                  DType::bf16);
    expect_backward_like_reference(ctx, kCuda, {.lengths = {20001}, .d_inner = 8, .d_state = 16},
                                   DType::f32, true);
    expect_backward_like_reference(ctx, kCuda, {.lengths = {2048}, .d_inner = 640, .d_state = 16},
                                   DType::bf16, true);
  });
}

TEST(SelectiveScanCuda, SplitAnywhereAndCarryTheState) {
  op_test::on_cuda([](Context& ctx) {
    expect_split_is_whole(ctx, kCuda, {.lengths = {1300}, .d_inner = 20, .d_state = 16},
                          {1, 31, 32, 33, 64, 255, 256, 257, 1024, 1299});
  });
}

TEST(SelectiveScanCuda, StepByStepIsTheWholePass) {
  op_test::on_cuda([](Context& ctx) { expect_steps_are_the_pass(ctx, kCuda); });
}

std::vector<int> one_and_many(int one, int many, int length) {
  std::vector<int> lengths(static_cast<size_t>(many) + 1, length);
  lengths.front() = one;
  return lengths;
}

// Few sequences are cut along time or scanned by warps in turn, and channels are spread over more
// lanes; many are not: the same bits.
TEST(SelectiveScanCuda, PackedIsSeparateBitForBit) {
  op_test::on_cuda([](Context& ctx) {
    for (const Case& packed :
         {Case{.lengths = {33, 50, 7}, .d_inner = 40, .d_state = 16},
          Case{.lengths = {1, 1600, 0, 255, 256, 257, 512}, .d_inner = 100, .d_state = 16},
          Case{.lengths = std::vector<int>(24, 40), .d_inner = 512, .d_state = 16},
          Case{.lengths = std::vector<int>(6, 2100), .d_inner = 400, .d_state = 16},
          Case{.lengths = {2047, 2048, 4097, 6145, 8}, .d_inner = 12, .d_state = 16},
          Case{.lengths = one_and_many(6200, 60, 20), .d_inner = 100, .d_state = 16},
          Case{.lengths = one_and_many(13000, 60, 15), .d_inner = 96, .d_state = 16},
          Case{.lengths = {1100, 900}, .d_inner = 33, .d_state = 64}})
      expect_packed_is_separate(ctx, ctx, packed);
  });
}

// Alone in parts of pieces, together in whole pieces, in other parts, or some in each (the fourth).
TEST(SelectiveScanCuda, StreamsPackedIsSeparateBitForBit) {
  op_test::on_cuda([](Context& ctx) {
    for (const Case& packed :
         {Case{.lengths = {33, 50, 7}, .d_inner = 64, .d_state = 16},
          Case{.lengths = {300, 64, 0, 2500, 2048}, .d_inner = 64, .d_state = 16},
          Case{.lengths = {150, 70, 64}, .d_inner = 4224, .d_state = 16},
          Case{.lengths = {192, 64, 130, 128, 128, 90, 160, 128, 132},
          .d_inner = 2048,
          .d_state = 16},
          Case{.lengths = {200, 130, 2100}, .d_inner = 96, .d_state = 16, .n_groups = 3},
          Case{.lengths = {33, 50, 7}, .d_inner = 32, .d_state = 64},
          Case{.lengths = {300, 64, 0, 2500, 2048}, .d_inner = 16, .d_state = 64},
          Case{.lengths = {150, 70, 64}, .d_inner = 1056, .d_state = 64},
          Case{.lengths = {200, 130, 2100}, .d_inner = 48, .d_state = 32, .n_groups = 3},
          Case{.lengths = {150, 2100}, .d_inner = 32, .d_state = 128}})
      expect_packed_is_separate(ctx, ctx, packed, DType::bf16);
  });
}

TEST(SelectiveScanCuda, GivesTheSameBitsTwice) {
  op_test::on_cuda([](Context& ctx) {
    expect_same_bits(ctx, ctx, {.lengths = {700, 61, 3, 2000}, .d_inner = 300, .d_state = 16});
    expect_same_bits(ctx, ctx, {.lengths = {700, 61, 3, 2100}, .d_inner = 320, .d_state = 16},
                     DType::bf16);
    expect_same_bits(ctx, ctx, {.lengths = {700, 61, 3, 2100}, .d_inner = 96, .d_state = 64},
                     DType::bf16);
  });
}

TEST(SelectiveScanCuda, RowsMayRepeat) {
  op_test::on_cuda([](Context& ctx) { expect_rows_may_repeat(ctx); });
}

TEST(SelectiveScanCuda, SlowModesReachTheirGain) {
  op_test::on_cuda([](Context& ctx) {
    for (double rate : kSlowRates) expect_gain(ctx, kCuda, rate, 4096);
  });
}

TEST(SelectiveScanCuda, ExtremesStayFinite) {
  op_test::on_cuda([](Context& ctx) { expect_extremes_stay_finite(ctx); });
}

}  // namespace
}  // namespace krait
