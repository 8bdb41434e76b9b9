#include "generate/bpe.h"

#include <gtest/gtest.h>

#include <numeric>

#include "core/rng.h"

namespace krait {
namespace {

Bpe::Options byte_options() {
  Bpe::Options options;
  std::iota(options.byte_ids.begin(), options.byte_ids.end(), 0);
  return options;
}

std::vector<int32_t> encode(const Bpe& bpe, std::string_view word) {
  Bpe::Scratch scratch;
  std::vector<int32_t> out = {-7};  // encode() appends
  bpe.encode(word, scratch, out);
  EXPECT_EQ(out.front(), -7);
  out.erase(out.begin());
  return out;
}

// The definition, as slowly as it reads.
std::vector<int32_t> encode_slowly(const std::vector<Bpe::Merge>& merges, std::string_view word) {
  std::vector<int32_t> ids;
  for (const char c : word) ids.push_back(static_cast<uint8_t>(c));
  for (;;) {
    size_t best_rank = merges.size(), best_at = 0;
    for (size_t at = 0; at + 1 < ids.size(); ++at) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank].left == ids[at] && merges[rank].right == ids[at + 1]) {
          best_rank = rank;
          best_at = at;
        }
      }
    }
    if (best_rank == merges.size()) return ids;
    ids[best_at] = merges[best_rank].result;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(best_at) + 1);
  }
}

TEST(Bpe, MergesByRankThenFromTheLeft) {
  Bpe::Options options = byte_options();
  options.merges = {{'b', 'c', 256}, {'a', 'b', 257}, {'a', 'a', 258}, {257, 'c', 259}};
  const Bpe bpe(options);
  EXPECT_EQ(encode(bpe, "abc"), (std::vector<int32_t>{'a', 256}));
  EXPECT_EQ(encode(bpe, "abd"), (std::vector<int32_t>{257, 'd'}));
  EXPECT_EQ(encode(bpe, "aaa"), (std::vector<int32_t>{258, 'a'}));
  EXPECT_EQ(encode(bpe, "x"), (std::vector<int32_t>{'x'}));
  EXPECT_TRUE(encode(bpe, "").empty());
}

TEST(Bpe, LastOfARepeatedMergeCounts) {
  Bpe::Options options = byte_options();
  options.merges = {{'a', 'b', 256}, {'b', 'c', 257}, {'a', 'b', 256}};
  EXPECT_EQ(encode(Bpe(options), "abc"), (std::vector<int32_t>{'a', 257}));
}

// Words on both sides of where the algorithm changes, random merges (also of merged symbols): as
// the definition says.
TEST(Bpe, IsTheDefinition) {
  Rng rng(5);
  for (int round = 0; round < 60; ++round) {
    Bpe::Options options = byte_options();
    std::vector<int32_t> symbols = {'a', 'b', 'c'};
    for (int32_t id = 256; id < 290; ++id) {
      options.merges.push_back(
          {symbols[rng.below(symbols.size())], symbols[rng.below(symbols.size())], id});
      symbols.push_back(id);
    }
    const Bpe bpe(options);
    std::vector<Bpe::Merge> distinct;  // of a pair given twice only the last counts
    for (size_t i = 0; i < options.merges.size(); ++i) {
      bool again = false;
      for (size_t k = i + 1; k < options.merges.size(); ++k) {
        again |= options.merges[i].left == options.merges[k].left &&
                 options.merges[i].right == options.merges[k].right;
      }
      distinct.push_back(again ? Bpe::Merge{-1, -1, -1} : options.merges[i]);
    }
    for (const size_t length : {2u, 3u, 7u, 47u, 48u, 49u, 50u, 150u}) {
      std::string word;
      for (size_t i = 0; i < length; ++i) word += static_cast<char>('a' + rng.below(3));
      EXPECT_EQ(encode(bpe, word), encode_slowly(distinct, word)) << word;
    }
  }
}

TEST(Bpe, BytesWithoutAToken) {
  Bpe::Options options = byte_options();
  options.byte_ids['x'] = options.byte_ids['y'] = -1;
  EXPECT_EQ(encode(Bpe(options), "axyb"), (std::vector<int32_t>{'a', 'b'}));  // dropped
  options.unk_id = 300;
  EXPECT_EQ(encode(Bpe(options), "axyb"), (std::vector<int32_t>{'a', 300, 300, 'b'}));
  options.fuse_unk = true;
  EXPECT_EQ(encode(Bpe(options), "axybx"), (std::vector<int32_t>{'a', 300, 'b', 300}));
}

TEST(Bpe, WholeWordsGoBeforeMerges) {
  Bpe::Options options = byte_options();
  options.merges = {{'a', 'b', 256}};
  options.whole_words = {{"abc", 300}};
  EXPECT_EQ(encode(Bpe(options), "abc"), (std::vector<int32_t>{300}));
  EXPECT_EQ(encode(Bpe(options), "abcd"), (std::vector<int32_t>{256, 'c', 'd'}));
}

TEST(Bpe, AMillionBytesInOneWord) {
  Bpe::Options options = byte_options();
  options.merges = {{'a', 'a', 256}, {256, 256, 257}, {257, 257, 258}};
  const std::vector<int32_t> ids = encode(Bpe(options), std::string(1000003, 'a'));
  ASSERT_EQ(ids.size(), 125002u);
  EXPECT_EQ(ids.front(), 258);
  EXPECT_EQ(ids[125000], 256);
  EXPECT_EQ(ids[125001], 'a');
}

}  // namespace
}  // namespace krait
