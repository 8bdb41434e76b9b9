// decoder_step: a block's weights flow through a ring in shared memory. One warp copies them, long
// before they are multiplied, past every exchange between blocks: what a block multiplies, and in
// which order, is known from the start of the kernel.
#pragma once

#include <cuda_bf16.h>

#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/mbarrier.cuh"
#include "ops/cuda/mma.cuh"
#include "ops/cuda/tile_copy.cuh"
#include "ops/decoder_step_plan.h"

namespace krait::cuda {

// Of the threads that multiply.
__device__ __forceinline__ int thread_index() {
  const auto index = static_cast<int>(threadIdx.x);
  __builtin_assume(index >= 0 && index < kDecoderThreads);  // divisions are shifts
  return index;
}

// Barrier of the threads that multiply: the warp that copies is not held up.
__device__ __forceinline__ void sync_multipliers() { meet_first<kDecoderThreads>(); }

// What a block multiplies of one of a layer's matrices, in tiles of 8 low and 8 high rows:
// neighbours, but in x_proj row r of a tile is part r / kDecoderPartRows of the matrix's row r %
// kDecoderPartRows.
struct ProductShape {
  int row_bytes;
  int bytes;      // of a tile's row: a part of the matrix's, or all
  int first;      // row of the matrix
  int count;      // of its rows
  int tile_rows;  // of the matrix in a tile: kDecoderTile, of x_proj kDecoderPartRows
  int tiles;
  int halved;  // tile, -1: none
};
static_assert(sizeof(ProductShape) == kDecoderProductBytes);

// The ring's places and their barriers. A piece is kDecoderPieceBytes of each row of a tile, or
// what is left of them; row r, then its high row 8 further, begins at r kDecoderPiecePitch, so that
// rows that are read together are in different banks. Rows that do not exist are not written.
struct WeightRing {
  uint32_t pieces, filled, emptied;  // of the first place
  int stages;

  static constexpr bool kBulk =
#if __CUDA_ARCH__ >= 900
      true;
#else
      false;  // the lanes of the copying warp copy 16 bytes at a time
#endif

  __device__ WeightRing(const void* memory, const void* barriers, int count)
      : pieces(shared_address(memory)),
        filled(shared_address(barriers)),
        emptied(filled + 8 * static_cast<uint32_t>(count)),
        stages(count) {}
  // By one thread, before a barrier of all.
  __device__ void init() const {
    for (int i = 0; i < stages; ++i) {
      init_mbarrier(filled + 8 * static_cast<uint32_t>(i), kBulk ? 1 : 32);
      init_mbarrier(emptied + 8 * static_cast<uint32_t>(i), kDecoderWarps / kDecoderGroups);
    }
#if __CUDA_ARCH__ >= 900
    publish_mbarriers();  // to the copies
#endif
  }
};

// A place in the ring, and how often it has been come round to.
struct RingPlace {
  int stage = 0;
  uint32_t turn = 0;

  // By at most a round.
  __device__ __forceinline__ void advance(const WeightRing& ring, int pieces = 1) {
    stage += pieces;
    if (stage < ring.stages) return;
    stage -= ring.stages;
    ++turn;
  }
  __device__ uint32_t piece(const WeightRing& ring) const {
    return ring.pieces + static_cast<uint32_t>(stage) * kDecoderStageBytes;
  }
  __device__ uint32_t filled(const WeightRing& ring) const {
    return ring.filled + 8 * static_cast<uint32_t>(stage);
  }
  __device__ uint32_t emptied(const WeightRing& ring) const {
    return ring.emptied + 8 * static_cast<uint32_t>(stage);
  }
};

// A piece of a tile: place r of it is for what lies r % 4 `step`s, r / 4 % 2 `four_steps` and r / 8
// `eight_steps` behind `from`.
struct Piece {
  const char* from;
  DecoderPieceRows rows;
  int64_t step, four_steps, eight_steps;

  __device__ __forceinline__ const char* row(int r) const {
    return from + r % 4 * step + r / 4 % 2 * four_steps + r / 8 * eight_steps;
  }
  __device__ __forceinline__ bool is_full() const {
    return rows.high == kDecoderTile / 2 && rows.high_bytes == rows.low_bytes;
  }
};

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void copy_rows(const char* from, int rows, int bytes, int64_t step,
                                          uint32_t to, uint32_t filled) {
  if (bytes <= 0) return;
#pragma unroll 1
  for (int row = 0; row < rows; ++row, from += step, to += kDecoderPiecePitch)
    copy_bulk_once(to, from, bytes, filled);
}
#endif

// Copies a piece. The whole warp calls it; `filled` hears of what has arrived.
__device__ __forceinline__ void copy_piece(const Piece& p, uint32_t to, uint32_t filled) {
#if __CUDA_ARCH__ >= 900
  // By one thread, row by row: what the copies take from uniform registers differs from lane to
  // lane else, and each lane's would wait for the one before.
  if (elect_one()) {
    const DecoderPieceRows& r = p.rows;
    arrive_and_expect(filled, r.low * r.low_bytes + r.high * r.high_bytes);
    if (p.is_full()) {
#pragma unroll
      for (int row = 0; row < kDecoderTile; ++row)
        copy_bulk_once(to + row * kDecoderPiecePitch, p.row(row), r.low_bytes, filled);
    } else {
      copy_rows(p.from, r.low, r.low_bytes, p.step, to, filled);
      copy_rows(p.from + p.eight_steps, r.high, r.high_bytes, p.step,
                to + kDecoderTile / 2 * kDecoderPiecePitch, filled);
    }
  }
  __syncwarp();
#else
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 4
  for (int row = 0; row < kDecoderTile; ++row) {
    const bool is_high = row >= kDecoderTile / 2;
    if (row % (kDecoderTile / 2) >= (is_high ? p.rows.high : p.rows.low)) continue;
#pragma unroll
    for (int i = 16 * lane; i < kDecoderPieceBytes; i += 16 * 32)
      if (i < (is_high ? p.rows.high_bytes : p.rows.low_bytes))
        copy_async_uncached(to + static_cast<uint32_t>(row * kDecoderPiecePitch + i),
                            p.row(row) + i);
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(filled) : "memory");
#endif
}

// What the copying warp does: of each product the tiles, of each tile its rows piece by piece. At
// most kDecoderPiecesUnderWay are on their way at a time, for what blocks exchange queues behind
// them. ahead: asks for what else the next product needs.
template <class Products, class Ahead>
__device__ __forceinline__ void stream_weights(const Products& products, const WeightRing& ring,
                                               const Ahead& ahead) {
  RingPlace next, arriving;
  int under_way = 0;
#pragma unroll 1
  for (int product = 0; product < products.count(); ++product) {
    const ProductShape s = products.shape(product);
    const bool in_parts = s.bytes < s.row_bytes;
    Piece p;
    p.step = s.row_bytes;
    p.four_steps = in_parts ? s.bytes : 4 * p.step;
    ahead.fetch_for(product + 1);
    const char* tile_begin = products.matrix(product) + s.first * p.step;
    int rows = s.count;
#pragma unroll 1
    for (int tile = 0; tile < s.tiles; ++tile) {
      const bool halved = tile == s.halved;
      const int span = decoder_piece_span(halved);
      const int tile_rows = in_parts ? kDecoderTile : min(rows, kDecoderTile);
      p.eight_steps = halved ? kDecoderPieceBytes : 2 * p.four_steps;
#pragma unroll 1
      for (int at = 0; at < s.bytes; at += span) {
        if (under_way == kDecoderPiecesUnderWay) {
          wait_for_phase(arriving.filled(ring), arriving.turn);
          arriving.advance(ring);
        } else {
          ++under_way;
        }
        if (next.turn > 0) wait_for_phase(next.emptied(ring), next.turn - 1);
        p.from = tile_begin + at;
        p.rows = decoder_piece_rows(tile_rows, halved, s.bytes - at);
        copy_piece(p, next.piece(ring), next.filled(ring));
        next.advance(ring);
      }
      rows -= s.tile_rows;
      tile_begin += s.tile_rows * p.step;
    }
  }
}

// The pieces in their order, for the warps that multiply: each group of warps takes every
// kDecoderGroups-th, whatever tile it is of.
class WeightReader {
 public:
  __device__ __forceinline__ explicit WeightReader(const WeightRing& ring)
      : ring_(ring), next_(thread_index() / (kDecoderThreads / kDecoderGroups)) {
    place_.stage = next_;
  }

  // Number of the group's next piece among those of the tile.
  __device__ __forceinline__ int next() const { return next_; }
  // A tile of so many pieces ends.
  __device__ __forceinline__ void end_tile(int pieces) { next_ -= pieces; }
  // Waits for the next piece; its address.
  __device__ __forceinline__ uint32_t take() const {
    wait_for_phase(place_.filled(ring_), place_.turn);
    return place_.piece(ring_);
  }
  // After this warp has read it.
  __device__ __forceinline__ void give_back() {
    __syncwarp();  // every lane has read
    if (thread_index() % 32 == 0) arrive(place_.emptied(ring_));
    place_.advance(ring_, kDecoderGroups);
    next_ += kDecoderGroups;
  }

 private:
  const WeightRing ring_;
  RingPlace place_;
  int next_;
};

}  // namespace krait::cuda
