#include "ops/decoder_step_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <vector>

namespace krait::cuda {
namespace {

constexpr int kH200 = 132;
constexpr size_t kHopperShared = 232448;

DecoderShape shape(int64_t d_model, int64_t n_layer, int64_t num_seqs) {
  return {.num_seqs = num_seqs,
          .n_layer = n_layer,
          .d_model = d_model,
          .d_inner = 2 * d_model,
          .d_state = 16,
          .d_conv = 4,
          .dt_rank = (d_model + 15) / 16,
          .vocab_size = 50280};
}

TEST(DecoderStepPlan, TakesEveryPublishedSizeOnHopper) {
  for (const int64_t d_model : {768, 1024, 1536, 2048, 2560, 4096})
    for (const bool int8 : {false, true})
      for (const int64_t num_seqs : {1, 2, 4, 5, 128}) {
        DecoderShape s = shape(d_model, 64, num_seqs);
        s.int8 = int8;
        const DecoderStepPlan p = plan_decoder_step(s, kH200, kHopperShared);
        ASSERT_TRUE(p.usable) << d_model << " " << num_seqs;
        EXPECT_EQ(p.blocks, kH200);
        EXPECT_LE(p.shared_bytes, kHopperShared);
        EXPECT_EQ(p.seqs, num_seqs == 1 ? 1 : kDecoderMaxSeqs);
      }
}

TEST(DecoderStepPlan, LeavesToTheOpsWhatItsAccessesDoNotFit) {
  const DecoderShape good = shape(768, 24, 1);
  const auto usable = [](const DecoderShape& s, size_t shared = kHopperShared) {
    return plan_decoder_step(s, kH200, shared).usable;
  };
  EXPECT_TRUE(usable(good));
  DecoderShape s = good;
  s.dt_rank = 47;
  EXPECT_FALSE(usable(s));
  s = good;
  s.d_conv = 3;
  EXPECT_FALSE(usable(s));
  for (const int64_t d_state : {0, 5, 12, 128, 256}) {
    s = good;
    s.d_state = d_state;
    EXPECT_FALSE(usable(s)) << d_state;
  }
  s = good;
  s.d_model = 776, s.int8 = true;
  EXPECT_FALSE(usable(s));
  s.int8 = false;
  EXPECT_TRUE(usable(s));
  s = good;
  s.d_inner = 1552;  // no four parts of whole 16 bytes
  EXPECT_FALSE(usable(s));
  s = good;
  s.dt_rank = 256;
  EXPECT_TRUE(usable(s));
  s.dt_rank = 264;
  EXPECT_FALSE(usable(s));
  EXPECT_FALSE(usable(good, 100 << 10));
  EXPECT_FALSE(usable(shape(16384, 2, 1)));
}

// Few multiprocessors: more channels for each, until they do not find room.
TEST(DecoderStepPlan, TakesManyChannelsABlock) {
  for (const int64_t num_seqs : {1, 4}) {
    const DecoderShape s = shape(4096, 64, num_seqs);
    for (const int multiprocessors : {132, 114, 84, 60})
      EXPECT_EQ(plan_decoder_step(s, multiprocessors, kHopperShared).seqs, num_seqs);
    EXPECT_FALSE(plan_decoder_step(s, 1, kHopperShared).usable);
  }
}

// A part of shared memory begins where the one before it ends, and none is cut short.
TEST(DecoderStepPlan, SharedMemoryHoldsEverything) {
  for (const int64_t num_seqs : {1, 4}) {
    const DecoderShape s = shape(2048, 48, num_seqs);
    const DecoderStepPlan p = plan_decoder_step(s, kH200, kHopperShared);
    const DecoderShared m = DecoderShared::of(s, p);
    const auto seqs = static_cast<size_t>(p.seqs);
    const std::array<size_t, 15> begins = {m.ring,     m.barriers, m.narrow, m.wide,   m.scale,
                                           m.partial,  m.sums,     m.x_dbl,  m.gate,   m.u,
                                           m.residual, m.shapes,   m.slots,  m.layers, m.bytes};
    const auto warps = size_t{kDecoderWarps}, stages = static_cast<size_t>(decoder_stages(p.seqs));
    const std::array<size_t, 14> least = {
        stages * kDecoderTile * kDecoderPiecePitch,
        2 * 8 * stages,
        2 * seqs * 2048,
        2 * seqs * 4096,
        4 * seqs * 2,
        4 * seqs * 2 * warps,
        4 * seqs * warps * static_cast<size_t>(decoder_group_rows(p.seqs)),
        4 * seqs * (128 + 32),
        4 * seqs * 32,
        4 * seqs * 32,
        4 * seqs * 16,
        size_t{kDecoderProducts} * kDecoderProductBytes,
        4 * seqs,
        size_t{48} * kDecoderLayerBytes};
    for (size_t i = 0; i < least.size(); ++i) {
      EXPECT_EQ(begins[i] % 16, 0u);
      EXPECT_GE(begins[i + 1], begins[i] + least[i]) << i;
    }
    EXPECT_EQ(p.shared_bytes, m.bytes);
  }
}

// A sequence alone and the same one among others must go the same way.
TEST(DecoderStepPlan, WhetherItIsUsableDoesNotDependOnTheNumberOfSequences) {
  int usable = 0;
  for (const size_t shared : {size_t{101376}, size_t{166912}, kHopperShared})
    for (const int64_t d_model : {128, 768, 1024, 1536, 2048, 4096})
      for (const int multiprocessors : {84, 108, 132}) {
        const bool one = plan_decoder_step(shape(d_model, 48, 1), multiprocessors, shared).usable;
        usable += one;
        for (int64_t num_seqs = 2; num_seqs <= 9; ++num_seqs)
          EXPECT_EQ(plan_decoder_step(shape(d_model, 48, num_seqs), multiprocessors, shared).usable,
                    one)
              << d_model << " " << shared << " " << num_seqs;
      }
  EXPECT_GT(usable, 0);
}

// Whatever the number of sequences: halved tiles add up in another order.
TEST(DecoderStepPlan, StreamsWhereALayerIsMoreThanTheRing) {
  for (const int64_t num_seqs : {1, 4, 7}) {
    const auto streams = [&](int64_t d_model, int multiprocessors, bool int8) {
      DecoderShape s = shape(d_model, 48, num_seqs);
      s.int8 = int8;
      return plan_decoder_step(s, multiprocessors, kHopperShared).streams;
    };
    for (const int64_t d_model : {768, 1024, 1280}) EXPECT_FALSE(streams(d_model, kH200, false));
    for (const int64_t d_model : {1536, 2048, 2560, 4096}) {
      EXPECT_TRUE(streams(d_model, kH200, false)) << d_model;
      EXPECT_EQ(streams(d_model, kH200, true), d_model > 1536) << d_model;
    }
    EXPECT_TRUE(streams(1024, 60, false));
  }
}

// Four neighbours are read at once, 16-byte aligned, and others a multiple of eight words further
// at a fixed distance.
TEST(DecoderStepPlan, ExchangedWordsHavePlacesOfTheirOwn) {
  for (const int seqs : {1, kDecoderMaxSeqs})
    for (const int64_t d_model : {64, 208, 768, 2048}) {
      const DecoderExchange e = DecoderExchange::of(shape(d_model, 2, seqs), seqs);
      for (const int64_t first : {e.residual, e.u, e.y, e.x_dbl}) EXPECT_EQ(first % 4, 0);
      EXPECT_EQ(e.places % 32, 0);
      std::vector<int> words(static_cast<size_t>(e.places));
      for (int i = 0; i < e.words; ++i) {
        const int place = decoder_word_place(i);
        ++words.at(static_cast<size_t>(place));
        EXPECT_EQ(place, decoder_word_place(i / 4 * 4) + i % 4);
        EXPECT_EQ(decoder_word_place(i / 4 * 4) % 4, 0);
        for (const int further : {256, 1024, 3072})
          EXPECT_EQ(decoder_word_place(i + further), place + decoder_word_place(further));
      }
      EXPECT_EQ(std::count(words.begin(), words.end(), 1), e.words);
      EXPECT_EQ(*std::max_element(words.begin(), words.end()), 1);
    }
}

TEST(DecoderStepPlan, HalvesATileOfAtMostHalfTheRows) {
  for (const int64_t rows : {1, 8, 17, 20, 24, 38, 40}) EXPECT_TRUE(decoder_halves_last(rows));
  for (const int64_t rows : {0, 9, 16, 25, 32, 381}) EXPECT_FALSE(decoder_halves_last(rows));
}

// Each byte of a tile's rows is in one place of one piece: in a halved tile the second half of a
// row's bytes is where the row 8 further would be.
void expect_each_byte_once(int rows, bool halved, int row_bytes) {
  std::vector<int> times(static_cast<size_t>(rows * row_bytes));
  const int span = decoder_piece_span(halved), half = kDecoderTile / 2;
  for (int at = 0; at < row_bytes; at += span) {
    const DecoderPieceRows p = decoder_piece_rows(rows, halved, row_bytes - at);
    EXPECT_LE(std::max(p.low, p.high), half);
    EXPECT_LE(std::max(p.low_bytes, p.high_bytes), kDecoderPieceBytes);
    const auto count = [&](int row, int from, int bytes) {
      for (int i = from; i < from + bytes; ++i)
        ++times.at(static_cast<size_t>(row * row_bytes + i));
    };
    for (int row = 0; row < p.low; ++row) count(row, at, p.low_bytes);
    for (int row = 0; row < p.high; ++row)
      halved ? count(row, at + kDecoderPieceBytes, p.high_bytes)
             : count(half + row, at, p.high_bytes);
  }
  EXPECT_EQ(times, std::vector<int>(times.size(), 1))
      << rows << " " << row_bytes << (halved ? " halved" : "");
}

TEST(DecoderStepPlan, PiecesHaveEachByteOfATileOnce) {
  for (const int row_bytes : {16, 256, 1024, 1040, 2048, 2064, 5120, 10240})
    for (int rows = 1; rows <= kDecoderTile; ++rows) {
      expect_each_byte_once(rows, false, row_bytes);
      if (decoder_halves_last(rows)) expect_each_byte_once(rows, true, row_bytes);
    }
}

TEST(DecoderStepPlan, EveryBlockOwnsAPairOfChannels) {
  for (const int64_t d_model : {64, 128, 768, 2048})
    for (const int multiprocessors : {1, 20, 108, 132}) {
      const DecoderStepPlan p =
          plan_decoder_step(shape(d_model, 2, 1), multiprocessors, kHopperShared);
      if (!p.usable) continue;
      EXPECT_GE(d_model, p.blocks);  // pairs of channels
      EXPECT_GE(p.max_channels * p.blocks, 2 * d_model);
    }
}

}  // namespace
}  // namespace krait::cuda
