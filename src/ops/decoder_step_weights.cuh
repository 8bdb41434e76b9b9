// decoder_step: a block's weights flow through a ring in shared memory, copied long before they are
// multiplied, past every exchange between blocks: what a warp multiplies, and in which order, is
// known from the start of the kernel.
#pragma once

#include <cuda_bf16.h>

#include "ops/cuda/async_copy.cuh"
#include "ops/decoder_step_plan.h"

namespace krait::cuda {

// The thread's number, in a way that what is computed from it is computed anew where it is needed:
// kept in registers through all the loops of the kernel it would not fit.
__device__ __forceinline__ int thread_index() {
  auto index = static_cast<int>(threadIdx.x);
  asm volatile("" : "+r"(index));
  __builtin_assume(index >= 0 && index < kDecoderThreads);
  return index;
}

// What a block multiplies of one of a layer's matrices. A tile has 8 low and 8 high rows: in most
// products neighbours, in in_proj x's and z's of the same channels.
struct ProductShape {
  int row_bytes;
  int first;      // low row of the matrix
  int count;      // rows; of in_proj channels
  int tile_rows;  // 16; of in_proj 8 channels
  int high_row;   // how far behind a low row its high row counts: 8, of in_proj 0
  int high_step;  // rows of the matrix from a low row to its high row
  int tiles;
};

// A warp's share of a row, in pieces: the warps cut the sum among themselves.
struct WarpPieces {
  int begin, end;
  __device__ __forceinline__ explicit WarpPieces(int row_bytes) {
    const int pieces = (row_bytes + kDecoderPieceBytes - 1) / kDecoderPieceBytes;
    const int warp = thread_index() / 32;
    begin = warp * pieces / kDecoderWarps;
    end = (warp + 1) * pieces / kDecoderWarps;
  }
};

// The next piece to be copied: of each product the tiles, of each tile the warp's pieces.
class WeightCursor {
 public:
  template <class Products>
  __device__ __forceinline__ explicit WeightCursor(const Products& products) {
    enter(products);
  }

  // Starts the copy of a piece: lane 4 g + t takes 16 bytes of the tile's low row g to `low`, of
  // its high row g to `high`; zeros where there is no row, or beyond its end. Behind the last
  // piece: nothing.
  template <class Products>
  __device__ __forceinline__ void copy(const Products& products, uint32_t low, uint32_t high) {
    if (pieces_left_ == 0) return;
    --pieces_left_;
    const int kept = pieces_left_ == 0 ? tail_bytes_ : 16;
    copy16(low, from_, min(low_bytes_, kept));
    copy16(high, from_ + high_offset_, min(high_bytes_, kept));
    from_ += kDecoderPieceBytes;
    if (pieces_left_ > 0) return;
    if (--tiles_left_ > 0) {
      from_ += tile_skip_;
      rows_left_ -= tile_rows_;
      start_tile();
    } else {
      ++product_;
      enter(products);
    }
  }

 private:
  static __device__ __forceinline__ void copy16(uint32_t to, const char* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes));
  }

  __device__ __forceinline__ void start_tile() {
    pieces_left_ = pieces_;
    low_bytes_ = rows_left_ > 0 ? 16 : 0;
    high_bytes_ = rows_left_ > high_row_ ? 16 : 0;
  }

  // The first product from here on of which this warp has a share.
  template <class Products>
  __device__ __forceinline__ void enter(const Products& products) {
    const int thread = thread_index(), g = thread % 32 / 4, t = thread % 4;
    pieces_left_ = 0;
#pragma unroll 1
    for (; product_ < products.count(); ++product_) {
      const ProductShape& s = products.shape(product_);
      const WarpPieces share(s.row_bytes);
      pieces_ = share.end - share.begin;
      tiles_left_ = s.tiles;
      if (tiles_left_ == 0 || pieces_ == 0) continue;
      high_row_ = s.high_row;
      tile_rows_ = s.tile_rows;
      high_offset_ = static_cast<int64_t>(s.high_step) * s.row_bytes;
      tile_skip_ = tile_rows_ * s.row_bytes - pieces_ * kDecoderPieceBytes;
      rows_left_ = s.count - g;
      const int begin = share.begin * kDecoderPieceBytes + t * 16;
      tail_bytes_ = begin + (pieces_ - 1) * kDecoderPieceBytes < s.row_bytes ? 16 : 0;
      from_ = products.matrix(product_) + static_cast<int64_t>(s.first + g) * s.row_bytes + begin;
      return start_tile();
    }
  }

  const char* from_;
  int64_t high_offset_;
  int product_ = 0, tiles_left_, tile_rows_, tile_skip_, pieces_, pieces_left_;
  int rows_left_, high_row_, low_bytes_, high_bytes_, tail_bytes_;
};

// A warp's ring of kStages pieces; every lane reads back what it copied itself.
template <int kStages>
class WeightRing {
 public:
  template <class Products>
  __device__ __forceinline__ WeightRing(const void* ring, const Products& products)
      : cursor_(products) {
    begin_ = shared_address(ring) + threadIdx.x / 32 * (kStages * kPieceBytes) +
             threadIdx.x % 32 * 16;
    at_ = begin_;
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) refill(products);
  }

  // The next piece of a tile; its place is then filled again.
  template <class Products>
  __device__ __forceinline__ void take(const Products& products, Packed<bf16, 8>& low,
                                       Packed<bf16, 8>& high) {
    wait_for_copies<kStages - 1>();
    low = load_copied<bf16, 8>(at_);
    high = load_copied<bf16, 8>(at_ + kPieceBytes / 2);
    refill(products);
  }

 private:
  static constexpr int kPieceBytes = kDecoderTile * kDecoderPieceBytes;

  template <class Products>
  __device__ __forceinline__ void refill(const Products& products) {
    cursor_.copy(products, at_, at_ + kPieceBytes / 2);
    end_copies();  // an empty group at the end, so that they can be counted
    at_ += kPieceBytes;
    if (at_ == begin_ + kStages * kPieceBytes) at_ = begin_;
  }

  WeightCursor cursor_;
  uint32_t begin_, at_;
};

// d += a b for a 16 x 16 a and a 16 x 8 b of bf16: lane 4 g + t has a's rows g and g + 8, b's
// column g, four neighbours each in an order of k that both share, and d's columns 2 t, 2 t + 1 of
// rows g (d0, d1) and g + 8 (d2, d3).
__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t low0, uint32_t high0,
                                         uint32_t low1, uint32_t high1, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(low0), "r"(high0), "r"(low1), "r"(high1), "r"(b0), "r"(b1));
}

// Four signed bytes as two pairs of bf16, exactly: the sign bit s and the seven others m of a byte
// are m - 128 s = (128 + m) - (128 + 128 s), both of which are bf16 with the bits m or s << 7 in
// their mantissa.
__device__ __forceinline__ void bytes_to_bf16(uint32_t bytes, uint32_t& pair0, uint32_t& pair1) {
  const auto pair = [](uint32_t b) {
    uint32_t plus = (b & 0x007f007fu) | 0x43004300u, minus = (b & 0x00800080u) | 0x43004300u;
    const __nv_bfloat162 q = __hsub2(reinterpret_cast<const __nv_bfloat162&>(plus),
                                     reinterpret_cast<const __nv_bfloat162&>(minus));
    return reinterpret_cast<const uint32_t&>(q);
  };
  pair0 = pair(__byte_perm(bytes, 0, 0x4140));
  pair1 = pair(__byte_perm(bytes, 0, 0x4342));
}

// A lane's 16 bytes of a row are kElements weights of type W; x are as many of one vector.
template <class W>
struct PieceProduct;

template <>
struct PieceProduct<bf16> {
  static constexpr int kElements = 8;
  static __device__ void add(float (&d)[4], const Packed<bf16, 8>& low, const Packed<bf16, 8>& high,
                             const Packed<bf16, 8>& x) {
    mma_bf16(d, low.word[0], high.word[0], low.word[1], high.word[1], x.word[0], x.word[1]);
    mma_bf16(d, low.word[2], high.word[2], low.word[3], high.word[3], x.word[2], x.word[3]);
  }
};

template <>
struct PieceProduct<int8_t> {
  static constexpr int kElements = 16;
  static __device__ void add(float (&d)[4], const Packed<bf16, 8>& low, const Packed<bf16, 8>& high,
                             const Packed<bf16, 16>& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t low0, low1, high0, high1;
      bytes_to_bf16(low.word[i], low0, low1);
      bytes_to_bf16(high.word[i], high0, high1);
      mma_bf16(d, low0, high0, low1, high1, x.word[2 * i], x.word[2 * i + 1]);
    }
  }
};

}  // namespace krait::cuda
