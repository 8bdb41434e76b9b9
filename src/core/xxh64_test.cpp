#include "core/xxh64.h"

#include <gtest/gtest.h>

namespace krait {
namespace {

uint64_t hash_of(std::string_view text) {
  Xxh64 hash;
  hash.update(text);
  return hash.value();
}

// Values that xxhsum -H64 prints.
TEST(Xxh64, GivesWhatTheSpecificationSays) {
  EXPECT_EQ(hex_digits(hash_of("")), "ef46db3751d8e999");
  EXPECT_EQ(hex_digits(hash_of("a")), "d24ec4f1a98c6e5b");
  EXPECT_EQ(hex_digits(hash_of("abc")), "44bc2cf5ad770999");
  EXPECT_EQ(hex_digits(hash_of("Nobody inspects the spammish repetition")), "fbcea83c8a378bf1");
}

TEST(Xxh64, PiecesGiveWhatTheWholeGives) {
  std::string text;
  for (int i = 0; i < 300; ++i) text += static_cast<char>(i * i * 7 + i);
  for (size_t piece = 1; piece <= 100; ++piece) {
    Xxh64 hash;
    for (size_t at = 0; at < text.size(); at += piece)
      hash.update(std::string_view(text).substr(at, piece));
    ASSERT_EQ(hash.value(), hash_of(text)) << piece;
  }
}

}  // namespace
}  // namespace krait
