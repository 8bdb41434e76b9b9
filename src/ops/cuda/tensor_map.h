// Matrices as the tile copies of compute capability 9.0 on take them (tile_copy.cuh).
#pragma once

#include <cuda.h>

#include "core/tensor.h"

namespace krait::cuda {

constexpr int kTileBytes = 128;  // of a row, in a tile

// Rows of bf16 that tile copies can read: from multiples of 16 bytes on, one behind the other.
bool tiles_possible(const Tensor& matrix);

// Tiles of `rows` rows (at most 256) of kTileBytes each, swizzled; zeros beyond the matrix's edges.
CUtensorMap tensor_map(const Tensor& matrix, int rows);

}  // namespace krait::cuda
