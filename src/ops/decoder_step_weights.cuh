// decoder_step: a block's weights flow through a ring in shared memory, copied long before they are
// multiplied, past every exchange between blocks: what a warp multiplies, and in which order, is
// known from the start of the kernel.
#pragma once

#include <cuda_bf16.h>

#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/mma.cuh"
#include "ops/decoder_step_plan.h"

namespace krait::cuda {

__device__ __forceinline__ int thread_index() {
  const auto index = static_cast<int>(threadIdx.x);
  __builtin_assume(index >= 0 && index < kDecoderThreads);  // divisions are shifts
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
static_assert(sizeof(ProductShape) == kDecoderProductBytes);

// A warp's share of a row, in pieces: the warps cut the sum among themselves.
struct WarpPieces {
  int begin, count;
  __device__ __forceinline__ explicit WarpPieces(int row_bytes) {
    const int pieces = (row_bytes + kDecoderPieceBytes - 1) / kDecoderPieceBytes;
    const int warp = thread_index() / 32;
    begin = warp * pieces / kDecoderWarps;
    count = (warp + 1) * pieces / kDecoderWarps - begin;
  }
};

// The next piece to be copied: of each product the tiles, of each tile the warp's pieces.
class WeightCursor {
 public:
  template <class Products>
  __device__ __forceinline__ explicit WeightCursor(const Products& products) {
    enter(products);
  }

  // Starts the copy of a piece, whole lines at a time: lane i takes the 16 bytes i % 8 of the low
  // rows i / 8 and i / 8 + 4, and of the high ones. Row r, then its high row 8 further, is at
  // to + r kDecoderPieceBytes, its halves exchanged where r is odd, so that the rows that are read
  // together are in different banks. Zeros where there is no row, or beyond its end. Behind the
  // last piece: nothing.
  template <class Products>
  __device__ __forceinline__ void copy(const Products& products, uint32_t to) {
    if (pieces_left_ == 0) return;
    --pieces_left_;
    const bool beyond = pieces_left_ == 0 && tail_is_short_;
    const char *const middle = from_ + half_, *const high = from_ + high_offset_;
    copy16(to, from_, rows_left_ <= 0 || beyond);
    copy16(to + 4 * kDecoderPieceBytes, middle, rows_left_ <= 4 || beyond);
    copy16(to + 8 * kDecoderPieceBytes, high, rows_left_ <= high_row_ || beyond);
    copy16(to + 12 * kDecoderPieceBytes, high + half_, rows_left_ <= high_row_ + 4 || beyond);
    from_ += kDecoderPieceBytes;
    if (pieces_left_ > 0) return;
    if (--tiles_left_ > 0) {
      from_ += tile_skip_;
      rows_left_ -= tile_rows_;
      pieces_left_ = pieces_;
    } else {
      ++product_;
      enter(products);
    }
  }

 private:
  static __device__ __forceinline__ void copy16(uint32_t to, const char* from, bool zero) {
    asm volatile(
        "{ .reg .pred zero; setp.ne.u32 zero, %2, 0; "
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, zero; }" ::"r"(to),
        "l"(__cvta_generic_to_global(from)), "r"(static_cast<uint32_t>(zero)));
  }

  // The first product from here on of which this warp has a share.
  template <class Products>
  __device__ __forceinline__ void enter(const Products& products) {
    const int lane = thread_index() % 32, row = lane / 8;
    pieces_left_ = 0;
#pragma unroll 1
    for (; product_ < products.count(); ++product_) {
      const ProductShape& s = products.shape(product_);
      const WarpPieces share(s.row_bytes);
      pieces_ = share.count;
      tiles_left_ = s.tiles;
      if (tiles_left_ == 0 || pieces_ == 0) continue;
      pieces_left_ = pieces_;
      high_row_ = s.high_row;
      tile_rows_ = s.tile_rows;
      half_ = 4 * s.row_bytes;
      high_offset_ = static_cast<int64_t>(s.high_step) * s.row_bytes;
      tile_skip_ = tile_rows_ * s.row_bytes - pieces_ * kDecoderPieceBytes;
      rows_left_ = s.count - row;
      const int begin = share.begin * kDecoderPieceBytes + lane % 8 * 16;
      tail_is_short_ = begin + (pieces_ - 1) * kDecoderPieceBytes >= s.row_bytes;
      from_ = products.matrix(product_) + static_cast<int64_t>(s.first + row) * s.row_bytes + begin;
      return;
    }
  }

  const char* from_;
  int64_t high_offset_;
  int product_ = 0, tiles_left_, tile_rows_, tile_skip_, pieces_, pieces_left_;
  int half_, rows_left_, high_row_;
  bool tail_is_short_;
};

// A warp's ring of kStages pieces.
template <int kStages>
class WeightRing {
 public:
  template <class Products>
  __device__ __forceinline__ WeightRing(const void* ring, const Products& products)
      : cursor_(products) {
    const int thread = thread_index(), lane = thread % 32, row = lane / 8;
    begin_ = shared_address(ring) + static_cast<uint32_t>(thread / 32 * kStages) * kPieceBytes;
    offset_ = static_cast<uint32_t>(row * kDecoderPieceBytes + (lane % 8 ^ row % 2 * 4) * 16);
    at_ = begin_;
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) refill(products);
  }

  // Waits for the next piece; its address.
  __device__ __forceinline__ uint32_t take() const {
    wait_for_copies<kStages - 1>();
    __syncwarp();  // the other lanes' copies are there too
    return at_;
  }
  // After all lanes have read it: its place is filled again.
  template <class Products>
  __device__ __forceinline__ void give_back(const Products& products) {
    __syncwarp();  // every lane has read
    refill(products);
  }

 private:
  static constexpr uint32_t kPieceBytes = kDecoderTile * kDecoderPieceBytes;

  template <class Products>
  __device__ __forceinline__ void refill(const Products& products) {
    cursor_.copy(products, at_ + offset_);
    end_copies();  // an empty group at the end, so that they can be counted
    at_ = at_ == begin_ + (kStages - 1) * kPieceBytes ? begin_ : at_ + kPieceBytes;
  }

  WeightCursor cursor_;
  uint32_t begin_, at_, offset_;
};

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

// Lane 4 g + t: its 16 bytes of rows g and g + 8 and of the vector g are neighbours along k, in the
// same order for all three. A lane's 16 bytes of a row are kElements weights of type W; x are as
// many of one vector.
template <class W>
struct PieceProduct;

template <>
struct PieceProduct<bf16> {
  static constexpr int kElements = 8;
  static __device__ void add(float (&d)[4], const Packed<bf16, 8>& low, const Packed<bf16, 8>& high,
                             const Packed<bf16, 8>& x) {
    mma_bf16(d, {low.word[0], high.word[0], low.word[1], high.word[1]}, x.word[0], x.word[1]);
    mma_bf16(d, {low.word[2], high.word[2], low.word[3], high.word[3]}, x.word[2], x.word[3]);
  }
};

template <>
struct PieceProduct<int8_t> {
  static constexpr int kElements = 16;
  static __device__ void add(float (&d)[4], const Packed<bf16, 8>& low, const Packed<bf16, 8>& high,
                             const Packed<bf16, 16>& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t rows[4];
      bytes_to_bf16(low.word[i], rows[0], rows[2]);
      bytes_to_bf16(high.word[i], rows[1], rows[3]);
      mma_bf16(d, rows, x.word[2 * i], x.word[2 * i + 1]);
    }
  }
};

}  // namespace krait::cuda
