// decoder_step: a block's weights flow through a ring in shared memory. One warp copies them, long
// before they are multiplied, past every exchange between blocks: what a block multiplies, and in
// which order, is known from the start of the kernel.
#pragma once

#include <cuda_bf16.h>

#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/mbarrier.cuh"
#include "ops/cuda/mma.cuh"
#include "ops/decoder_step_plan.h"

namespace krait::cuda {

// Of the threads that multiply.
__device__ __forceinline__ int thread_index() {
  const auto index = static_cast<int>(threadIdx.x);
  __builtin_assume(index >= 0 && index < kDecoderThreads);  // divisions are shifts
  return index;
}

// Barrier of the threads that multiply: the warp that copies is not held up.
__device__ __forceinline__ void sync_multipliers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kDecoderThreads) : "memory");
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
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // for the copies
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

// Copies `bytes` of each of the rows of a tile that exist; lane r < 16 names its row, or null. The
// whole warp calls it. `filled` hears of what has arrived.
__device__ __forceinline__ void copy_piece(const char* from, int bytes, uint32_t to,
                                           uint32_t filled) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#if __CUDA_ARCH__ >= 900
  const int rows = __popc(__ballot_sync(~0u, from != nullptr));
  if (lane == 0) arrive_and_expect(filled, rows * bytes);
  __syncwarp();  // the bytes are announced
  if (from)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to + static_cast<uint32_t>(lane * kDecoderPiecePitch)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(filled)
        : "memory");
#else
#pragma unroll 4
  for (int row = 0; row < kDecoderTile; ++row) {
    const auto address = __shfl_sync(~0u, reinterpret_cast<uint64_t>(from), row);
    const auto* source = reinterpret_cast<const char*>(address);
#pragma unroll
    for (int i = 16 * lane; i < kDecoderPieceBytes; i += 16 * 32)
      if (source && i < bytes)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                         to + static_cast<uint32_t>(row * kDecoderPiecePitch + i)),
                     "l"(__cvta_generic_to_global(source + i))
                     : "memory");
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(filled) : "memory");
#endif
}

// What the copying warp does: of each product the tiles, of each tile its rows piece by piece. At
// most kDecoderPiecesUnderWay are on their way at a time, for what blocks exchange queues behind
// them.
template <class Products>
__device__ __forceinline__ void stream_weights(const Products& products, const WeightRing& ring) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane % 8;
  const bool is_high = lane / 8 == 1;
  RingPlace next, arriving;
  int under_way = 0;
#pragma unroll 1
  for (int product = 0; product < products.count(); ++product) {
    const ProductShape& s = products.shape(product);
    const char* from =
        products.matrix(product) +
        static_cast<int64_t>(s.first + row + (is_high ? s.high_step : 0)) * s.row_bytes;
    int index = row + (is_high ? s.high_row : 0);
#pragma unroll 1
    for (int tile = 0; tile < s.tiles; ++tile) {
      const bool there = lane < kDecoderTile && index < s.count;
#pragma unroll 1
      for (int at = 0; at < s.row_bytes; at += kDecoderPieceBytes) {
        if (under_way == kDecoderPiecesUnderWay) {
          wait_for_phase(arriving.filled(ring), arriving.turn);
          arriving.advance(ring);
        } else {
          ++under_way;
        }
        if (next.turn > 0) wait_for_phase(next.emptied(ring), next.turn - 1);
        copy_piece(there ? from + at : nullptr, min(kDecoderPieceBytes, s.row_bytes - at),
                   next.piece(ring), next.filled(ring));
        next.advance(ring);
      }
      index += s.tile_rows;
      from += static_cast<int64_t>(s.tile_rows) * s.row_bytes;
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

// Products of 16 bytes of a row with those elements of the vectors. Lane 4 g + t holds the t-th 16
// bytes of 64 of row g, four words: the tensor core takes the first and third for its row g, the
// second and fourth for its row g + 8, and finds the vectors' first and third words in even
// columns, the others in odd ones. So of what it adds up for two columns, [row g, even] + [row g +
// 8, odd] is wanted: d[0] + d[3].
template <class W, int kSeqs>
struct RowProduct;

// bf16: vector s in columns 2 s and 2 s + 1; lane 4 g + s has its sum for row g.
template <int kSeqs>
struct RowProduct<bf16, kSeqs> {
  static constexpr int kSets = 1;         // of eight columns, for all vectors
  static constexpr int kVectorBytes = 1;  // of all of a vector's words, for each byte of a row
  using Sums = float[4];

  static __device__ int seq_of(int column, int /*set*/) { return column / 2; }
  static __device__ int offset_of(int column) { return column % 2 * 8; }
  static __device__ __forceinline__ void add(Sums& d, const Packed<bf16, 8>& row, const uint2& x) {
    mma_bf16(d, row.word, x.x, x.y);
  }
  static __device__ __forceinline__ void store(float* sums, int t, const Sums (&d)[kSets]) {
    if (t < kSeqs) sums[t] = d[0][0] + d[0][3];
  }
};

// Weights of 8 bits: elements are x = scale (256 high + low), both of 8 bits, too; sums are exact.
// Vector s has four columns: high and low bytes.
template <int kSeqs>
struct RowProduct<int8_t, kSeqs> {
  static constexpr int kSets = (kSeqs + 1) / 2, kVectorBytes = 2;
  using Sums = int[4];

  static __device__ int seq_of(int column, int set) { return 2 * set + column / 4; }
  static __device__ int offset_of(int column) { return column % 4 * 8; }
  static __device__ __forceinline__ void add(Sums& d, const Packed<bf16, 8>& row, const uint2& x) {
    mma_s8(d, row.word, x.x, x.y);
  }
  static __device__ __forceinline__ void store(float* sums, int t, const Sums (&d)[kSets]) {
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const auto part = static_cast<float>(d[set][0] + d[set][3]) * (t % 2 == 0 ? 256.0f : 1.0f);
      const float sum = part + __shfl_xor_sync(~0u, part, 1);
      if (const int seq = 2 * set + t / 2; t % 2 == 0 && seq < kSeqs) sums[seq] = sum;
    }
  }
};

// Where word i of a vector of bf16 pairs is kept: of each four the second and third have changed
// places. Words 2 i and 2 i + 1: at bf16_words(i) and two further.
__device__ __forceinline__ int vector_word(int i) { return (i & ~3) | (i & 1) * 2 | (i >> 1 & 1); }
__device__ __forceinline__ int bf16_words(int i) { return vector_word(2 * i); }
// Where the high bytes of elements 4 i to 4 i + 3 are kept, as a word; the low ones four further.
__device__ __forceinline__ int byte_words(int i) {
  return (i & ~3) * 2 + (i & 1) * 2 + (i >> 1 & 1);
}

}  // namespace krait::cuda
