// In place of the header of this name.
#pragma once

#include "core/dtype.h"

// (rows, columns) of bf16, in tiles of tile_rows rows.
struct CUtensorMap {
  const krait::bf16* data;
  int rows, columns, tile_rows;
};

namespace krait::cuda {

constexpr int kTileBytes = 128;

}  // namespace krait::cuda
