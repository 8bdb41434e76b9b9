// decoder_step: tiles of matrices times vectors, on the tensor cores.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/mma.cuh"
#include "ops/decoder_step_vectors.cuh"
#include "ops/decoder_step_weights.cuh"

namespace krait::cuda {

// Products of 16 bytes of each of a tile's rows with those elements of the vectors. Lane 4 g + t
// holds the t-th 16 bytes of 64 of row g, four words: the tensor core takes the first and third for
// its row g, the second and fourth for its row g + 8, and finds the vectors' first and third words
// in even columns, the others in odd ones. So of what it adds up for two columns, [row g, even] +
// [row g + 8, odd] is wanted: d[0] + d[3]. Low and high rows are multiplied one after the other.
__device__ __forceinline__ float wanted(const float (&d)[4]) { return d[0] + d[3]; }

template <class W, int kSeqs>
struct RowProduct;

// bf16: vector s in columns 2 s and 2 s + 1; lane 4 g + s has its sum for row g.
template <int kSeqs>
struct RowProduct<bf16, kSeqs> {
  static constexpr bool kHalves = true;   // tiles may be halved
  static constexpr int kSets = 1;         // of eight columns, for all vectors
  static constexpr int kVectorBytes = 1;  // of all of a vector's words, for each byte of a row
  using Sums = float[4];

  static __device__ int seq_of(int column, int /*set*/) { return column / 2; }
  static __device__ int part_of(int /*column*/, int /*set*/) { return 0; }
  static __device__ int offset_of(int column) { return column % 2 * 8; }
  static __device__ __forceinline__ void add(Sums (&sums)[kSets], const Packed<bf16, 8>& row,
                                             const uint2 (&x)[kSets]) {
    mma_bf16(sums[0], row.word, x[0].x, x[0].y);
  }
  static __device__ __forceinline__ void add(Sums (&low)[kSets], Sums (&high)[kSets],
                                             const Packed<bf16, 8>& low_row,
                                             const Packed<bf16, 8>& high_row,
                                             const uint2 (&x)[kSets]) {
    add(low, low_row, x);
    add(high, high_row, x);
  }
  // sums: (rows, kSeqs)
  static __device__ __forceinline__ void store(float* sums, int g, int t, const Sums (&low)[kSets],
                                               const Sums (&high)[kSets]) {
    if (t >= kSeqs) return;
    sums[g * kSeqs + t] = wanted(low[0]);
    sums[(g + 8) * kSeqs + t] = wanted(high[0]);
  }
};

// Weights of 8 bits: elements are x = scale (256 high + low), both of 8 bits, too; sums are exact.
// Vector s has four columns: high and low bytes.
template <int kSeqs>
struct RowProduct<int8_t, kSeqs> {
  static constexpr bool kHalves = false;
  static constexpr int kSets = (kSeqs + 1) / 2, kVectorBytes = 2;
  using Sums = int[4];

  static __device__ int seq_of(int column, int set) { return 2 * set + column / 4; }
  static __device__ int part_of(int /*column*/, int /*set*/) { return 0; }
  static __device__ int offset_of(int column) { return column % 4 * 8; }
  static __device__ __forceinline__ void add(Sums (&low)[kSets], Sums (&high)[kSets],
                                             const Packed<bf16, 8>& low_row,
                                             const Packed<bf16, 8>& high_row,
                                             const uint2 (&x)[kSets]) {
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      mma_s8(low[set], low_row.word, x[set].x, x[set].y);
      mma_s8(high[set], high_row.word, x[set].x, x[set].y);
    }
  }
  static __device__ __forceinline__ void store(float* sums, int g, int t, const Sums (&low)[kSets],
                                               const Sums (&high)[kSets]) {
    store(sums + g * kSeqs, t, low);
    store(sums + (g + 8) * kSeqs, t, high);
  }

 private:
  static __device__ __forceinline__ void store(float* sums, int t, const Sums (&d)[kSets]) {
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const auto part = static_cast<float>(d[set][0] + d[set][3]) * (t % 2 == 0 ? 256.0f : 1.0f);
      const float sum = part + __shfl_xor_sync(~0u, part, 1);
      if (const int seq = 2 * set + t / 2; t % 2 == 0 && seq < kSeqs) sums[seq] = sum;
    }
  }
};

// x_proj's tiles, whose rows are parts of four rows: what a part is multiplied with is the same
// part of the vectors. One vector: its parts are columns, of which each row wants its own.
template <int kSeqs>
struct PartProduct {
  static_assert(kSeqs == 1 && kDecoderParts == 4 && kDecoderPartRows == 4);
  static constexpr bool kHalves = false;
  static constexpr int kSets = 1, kVectorBytes = 1;
  using Sums = float[4];

  static __device__ int seq_of(int /*column*/, int /*set*/) { return 0; }
  static __device__ int part_of(int column, int /*set*/) { return column / 2; }
  static __device__ int offset_of(int column) { return column % 2 * 8; }
  static __device__ __forceinline__ void add(Sums (&low)[kSets], Sums (&high)[kSets],
                                             const Packed<bf16, 8>& low_row,
                                             const Packed<bf16, 8>& high_row,
                                             const uint2 (&x)[kSets]) {
    RowProduct<bf16, 1>::add(low, high, low_row, high_row, x);
  }
  // Parts 0 and 2, 1 and 3, then these: in the same order for every kSeqs.
  static __device__ __forceinline__ void store(float* sums, int g, int t, const Sums (&low)[kSets],
                                               const Sums (&high)[kSets]) {
    float sum = 0;
    if (t % 2 == g / 4) sum = t < 2 ? wanted(low[0]) : wanted(high[0]);
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    sum += __shfl_xor_sync(~0u, sum, 16);
    if (g < 4 && t == 0) sums[g] = sum;
  }
};

// Several vectors: a set of columns for each part.
template <>
struct PartProduct<kDecoderMaxSeqs> {
  static constexpr bool kHalves = false;
  static constexpr int kSeqs = kDecoderMaxSeqs, kSets = kDecoderParts, kVectorBytes = 1;
  using Sums = float[4];

  static __device__ int seq_of(int column, int /*set*/) { return column / 2; }
  static __device__ int part_of(int /*column*/, int set) { return set; }
  static __device__ int offset_of(int column) { return column % 2 * 8; }
  static __device__ __forceinline__ void add(Sums (&low)[kSets], Sums (&high)[kSets],
                                             const Packed<bf16, 8>& low_row,
                                             const Packed<bf16, 8>& high_row,
                                             const uint2 (&x)[kSets]) {
    mma_bf16(low[0], low_row.word, x[0].x, x[0].y);
    mma_bf16(low[1], low_row.word, x[1].x, x[1].y);
    mma_bf16(high[2], high_row.word, x[2].x, x[2].y);
    mma_bf16(high[3], high_row.word, x[3].x, x[3].y);
  }
  static __device__ __forceinline__ void store(float* sums, int g, int t, const Sums (&low)[kSets],
                                               const Sums (&high)[kSets]) {
    float sum = g < 4 ? wanted(low[0]) + wanted(high[2]) : wanted(low[1]) + wanted(high[3]);
    sum += __shfl_xor_sync(~0u, sum, 16);
    if (g < 4) sums[g * kSeqs + t] = sum;
  }
};

// What a lane multiplies of each piece: kRuns times 16 bytes of a low and of a high row. Product:
// RowProduct or PartProduct.
template <int kSeqs, class Product>
class TileMultiplier {
 public:
  // part_bytes: of a part of the vectors.
  __device__ __forceinline__ TileMultiplier(const DecoderArgs& a, const Vectors& v,
                                            int part_bytes = 0)
      : first_(thread_index() / 32 % kGroupWarps * 64 + thread_index() % 4 * 16) {
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const int seq = Product::seq_of(g(), set);
      has_vector_[set] = seq < a.num_seqs;
      x_[set] = reinterpret_cast<const char*>(v.x + (has_vector_[set] ? seq : 0) * v.stride) +
                Product::part_of(g(), set) * part_bytes + first_ * Product::kVectorBytes +
                Product::offset_of(g());
    }
  }

  // The next `tiles` tiles of a product, of which number halved_tile is halved, times the vectors:
  // each warp's share of the sums to `sums` (warps, rows of a group, kSeqs). row_bytes: of a tile's
  // rows.
  __device__ __forceinline__ void multiply(WeightReader& weights, int row_bytes, int tiles,
                                           int halved_tile, float* sums) const {
    sums += thread_index() / 32 * (decoder_group_rows(kSeqs) * kSeqs);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile, sums += kDecoderTile * kSeqs) {
      const bool halved = Product::kHalves && tile == halved_tile;
      const int log2_span = halved ? kLog2PieceBytes + 1 : kLog2PieceBytes;
      const int pieces = (row_bytes + (1 << log2_span) - 1) >> log2_span;
      Sums low[kSets] = {}, high[kSets] = {};
#pragma unroll 1
      while (weights.next() < pieces) {
        const int at = weights.next() << log2_span, left = row_bytes - at;
        if (halved)
          multiply_halved(low, high, weights, at, left - first_);
        else if (left >= kDecoderPieceBytes)
          multiply_piece<true>(low, high, weights, at, 0);
        else
          multiply_piece<false>(low, high, weights, at, left - first_);
      }
      if (halved) {
#pragma unroll
        for (int set = 0; set < kSets; ++set)
#pragma unroll
          for (int i = 0; i < 4; ++i) low[set][i] += high[set][i];
      }
      weights.end_tile(pieces);
      Product::store(sums, g(), thread_index() % 4, low, high);
    }
  }

 private:
  using Sums = typename Product::Sums;
  static constexpr int kSets = Product::kSets;
  static constexpr int kGroupWarps = kDecoderWarps / kDecoderGroups;
  static constexpr int kStep = 64 * kGroupWarps;  // bytes of a row from run to run
  static constexpr int kRuns = kDecoderPieceBytes / kStep;
  static constexpr int kLog2PieceBytes = 10;
  static_assert(1 << kLog2PieceBytes == kDecoderPieceBytes);

  static __device__ int g() { return thread_index() % 32 / 4; }

  // left: bytes of the rows from the lane's first on, if they end in this piece.
  template <bool kWhole>
  __device__ __forceinline__ void multiply_piece(Sums (&low)[kSets], Sums (&high)[kSets],
                                                 WeightReader& weights, int at, int left) const {
    constexpr uint32_t kHigh = kDecoderTile / 2 * kDecoderPiecePitch;
    uint2 x[kRuns][kSets]{};
    Packed<bf16, 8> low_row[kRuns]{}, high_row[kRuns]{};
#pragma unroll
    for (int i = 0; i < kRuns; ++i)
#pragma unroll
      for (int set = 0; set < kSets; ++set)
        if (has_vector_[set] && (kWhole || left > i * kStep))
          x[i][set] =
              *reinterpret_cast<const uint2*>(x_[set] + (at + i * kStep) * Product::kVectorBytes);
    const uint32_t piece =
        weights.take() + static_cast<uint32_t>(g() * kDecoderPiecePitch + first_);
#pragma unroll
    for (int i = 0; i < kRuns; ++i)
      if (kWhole || left > i * kStep) {
        low_row[i] = load_copied<bf16, 8>(piece + i * kStep);
        high_row[i] = load_copied<bf16, 8>(piece + kHigh + i * kStep);
      }
#pragma unroll
    for (int i = 0; i < kRuns; ++i) Product::add(low, high, low_row[i], high_row[i], x[i]);
    weights.give_back();
  }

  static __device__ __forceinline__ void swap(Sums (&a)[kSets], Sums (&b)[kSets]) {
#pragma unroll
    for (int set = 0; set < kSets; ++set)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto kept = a[set][i];
        a[set][i] = b[set][i];
        b[set][i] = kept;
      }
  }

  // Of a halved tile: the second half of a row's bytes is where the high row would be.
  __device__ __forceinline__ void multiply_halved(Sums (&low)[kSets], Sums (&high)[kSets],
                                                  WeightReader& weights, int at, int left) const {
    if constexpr (Product::kHalves) {
      constexpr uint32_t kHigh = kDecoderTile / 2 * kDecoderPiecePitch;
      const uint32_t piece =
          weights.take() + static_cast<uint32_t>(g() * kDecoderPiecePitch + first_);
#pragma unroll(kSeqs == 1 ? 2 : 1)  // without spills
      for (int half = 0; half < 2; ++half, at += kDecoderPieceBytes, left -= kDecoderPieceBytes) {
        uint2 x[kRuns][kSets]{};
        Packed<bf16, 8> row[kRuns]{};
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
          if (left <= i * kStep) continue;
          row[i] = load_copied<bf16, 8>(piece + half * kHigh + i * kStep);
#pragma unroll
          for (int set = 0; set < kSets; ++set)
            if (has_vector_[set])
              x[i][set] = *reinterpret_cast<const uint2*>(x_[set] +
                                                          (at + i * kStep) * Product::kVectorBytes);
        }
#pragma unroll
        for (int i = 0; i < kRuns; ++i) Product::add(low, row[i], x[i]);
        swap(low, high);
      }
      weights.give_back();
    }
  }

  const int first_;  // byte of a row
  bool has_vector_[kSets];
  const char* x_[kSets];
};

}  // namespace krait::cuda
