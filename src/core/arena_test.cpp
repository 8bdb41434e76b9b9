#include "core/arena.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace krait {
namespace {

TEST(Arena, GivesAlignedPiecesAndTakesThemBack) {
  Arena arena;
  void* first;
  {
    Arena::Scope scope(arena);
    first = arena.allocate(3);
    void* second = arena.allocate(100);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % kAlignment, 0u);
    EXPECT_GE(static_cast<char*>(second) - static_cast<char*>(first), 64);
  }
  Arena::Scope scope(arena);
  EXPECT_EQ(arena.allocate(3), first);
}

TEST(Arena, SteadyRoundsAllocateNothing) {
  Arena arena;
  const auto round = [&] {
    Arena::Scope scope(arena);
    for (int i = 0; i < 10; ++i) {
      Arena::Scope inner(arena);
      arena.allocate(size_t{3} << 20);
    }
    for (int i = 0; i < 5; ++i) arena.allocate(size_t{2} << 20);
  };
  round();
  round();
  const int64_t before = arena.block_allocations();
  for (int i = 0; i < 20; ++i) round();
  EXPECT_EQ(arena.block_allocations(), before);
  EXPECT_EQ(arena.capacity(), size_t{10} << 20);
}

// What a step of a large model does: layers keep much, and in between give back a little.
TEST(Arena, FirstRoundTakesLittleMoreThanLaterOnes) {
  Arena arena;
  size_t first_round = 0;
  {
    Arena::Scope scope(arena);
    for (int layer = 0; layer < 10; ++layer) {
      arena.allocate(size_t{100} << 20);
      arena.allocate(size_t{10} << 20);
      Arena::Scope inner(arena);
      arena.allocate(size_t{20} << 20);
    }
    first_round = arena.capacity();
  }
  EXPECT_EQ(arena.capacity(), size_t{10 * 110 + 20} << 20);
  EXPECT_LE(first_round, arena.capacity() * 5 / 4);
}

TEST(OwnedTensor, StartsAtZero) {
  const OwnedTensor t(DType::f32, {3, 5});
  for (int i = 0; i < 15; ++i) EXPECT_EQ(t->ptr<float>()[i], 0.0f);
}

}  // namespace
}  // namespace krait
