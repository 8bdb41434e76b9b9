// In place of the header of this name.
#pragma once

#include <cstring>

#include "cuda_words.h"
#include "ops/cuda/tensor_map.h"

namespace krait::cuda {

inline void prefetch_map(const CUtensorMap&) {}
inline void publish_to_copies() {}

// Swizzled: the 16 bytes number i of row r lie at i XOR r % 8. Zeros beyond the edges.
inline void copy_tile(uint32_t to, const CUtensorMap& map, int row, int column, uint32_t barrier) {
  if (to % 1024 != 0) emulated::fail("a tile that is not aligned");
  emulated::start_copy(-1, to, map.tile_rows * kTileBytes, barrier, [=](char* tile) {
    for (int r = 0; r < map.tile_rows; ++r)
      for (int c = 0; c < kTileBytes / 2; ++c) {
        const bool there = row + r < map.rows && column + c < map.columns;
        const bf16 x = there ? map.data[int64_t{row + r} * map.columns + column + c] : bf16();
        std::memcpy(tile + r * kTileBytes + (c / 8 ^ r % 8) * 16 + c % 8 * 2, &x, sizeof x);
      }
  });
}

inline void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulated::fail("a copy that is not aligned");
  emulated::start_copy(-1, to, bytes, barrier,
                       [=](char* there) { std::memcpy(there, from, static_cast<size_t>(bytes)); });
}

inline void copy_bulk_once(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  copy_bulk(to, from, bytes, barrier);
}

// Reads its source when it happens.
inline void copy_to_block(int block, uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
  if (from % 16 != 0) emulated::fail("a copy that is not aligned");
  const char* const source = emulated::pointer_to(from, bytes);
  emulated::start_copy(block, to, bytes, barrier, [=](char* there) {
    std::memcpy(there, source, static_cast<size_t>(bytes));
  });
}

inline void arrive_at_block(int block, uint32_t barrier) {
  emulated::start_arrival(block, barrier);
}

}  // namespace krait::cuda
