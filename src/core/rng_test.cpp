#include "core/rng.h"

#include <gtest/gtest.h>

namespace krait {
namespace {

// Known answers of Philox4x32-10 (Random123's kat_vectors).
TEST(Rng, IsPhilox) {
  Rng zero(0, 0);
  EXPECT_EQ(zero.next_u32(), 0x6627e8d5u);
  EXPECT_EQ(zero.next_u32(), 0xe169c58du);
  EXPECT_EQ(zero.next_u32(), 0xbc57ac4cu);
  EXPECT_EQ(zero.next_u32(), 0x9b00dbd8u);
}

TEST(Rng, SeekContinuesExactly) {
  Rng a(7, 3);
  for (int i = 0; i < 13; ++i) a.next_u32();
  Rng b(7, 3);
  b.seek(a.position());
  for (int i = 0; i < 10; ++i) EXPECT_EQ(a.next_u32(), b.next_u32());
  EXPECT_NE(Rng(7, 4).next_u32(), Rng(7, 3).next_u32());
}

TEST(Rng, MomentsAreRight) {
  Rng rng(1);
  double sum = 0, squares = 0, uniform = 0;
  const int n = 200000;
  for (int i = 0; i < n; ++i) {
    const double x = rng.normal();
    sum += x;
    squares += x * x;
    uniform += rng.uniform();
  }
  EXPECT_NEAR(sum / n, 0, 0.01);
  EXPECT_NEAR(squares / n, 1, 0.02);
  EXPECT_NEAR(uniform / n, 0.5, 0.005);
  std::array<int, 3> counts{};
  for (int i = 0; i < 30000; ++i) ++counts[rng.below(3)];
  for (int c : counts) EXPECT_NEAR(c, 10000, 400);
}

}  // namespace
}  // namespace krait
