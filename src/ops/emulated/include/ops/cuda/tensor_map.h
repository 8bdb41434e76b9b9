// In place of the header of this name.
#pragma once

#include <cstdint>

// (rows, columns) of bf16, in tiles of tile_rows rows.
struct CUtensorMap {
  const uint16_t* data;
  int rows, columns, tile_rows;
};

namespace krait::cuda {

constexpr int kTileBytes = 128;

}  // namespace krait::cuda
