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
  EXPECT_LE(arena.capacity(),
            size_t{16} << 20);  // 10 MiB needed, and the tails of the first round's blocks
}

TEST(OwnedTensor, StartsAtZero) {
  const OwnedTensor t(DType::f32, {3, 5});
  for (int i = 0; i < 15; ++i) EXPECT_EQ(t->ptr<float>()[i], 0.0f);
}

}  // namespace
}  // namespace krait
