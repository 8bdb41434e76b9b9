// decoder_step: what a block does between two exchanges.
#pragma once

#include <cstdint>

#include "ops/cuda/flagged_words.cuh"
#include "ops/cuda/math.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/decoder_step_weights.cuh"

namespace krait::cuda {

struct DecoderLayerArgs {
  const float *norm, *in_scale, *in_bias, *conv_weight, *conv_bias, *dt_bias, *A, *D, *out_scale,
      *out_bias;
  const void* matrix[4];  // in_proj, x_proj, dt_proj, out_proj
  float *conv, *ssm;
};
static_assert(sizeof(DecoderLayerArgs) == kDecoderLayerBytes);

struct DecoderArgs {
  DecoderLayerArgs layer[kDecoderMaxLayers];
  int n_layer;
  const int32_t *tokens, *slot;  // slot: null: sequence i uses slot i
  const bf16* embedding;         // null: the residual comes from the launch before
  const float* norm_f;           // null: the launch after goes on
  const void* head;
  const float* head_scale;
  float* logits;
  int64_t logits_stride;
  uint32_t* round;  // rounds so far: one a layer; they wrap after 2^32, when no word is so old
  FlaggedWord *residual, *u, *y, *x_dbl;
  DecoderShared shared;
  int num_seqs, d_model, d_inner, d_state, dt_rank, x_proj_rows, vocab_size;
  int x_stride, max_channels, max_out_rows;
  float eps;
  bool residual_f32;
};

__device__ __forceinline__ float round_bf16(float x) {
  return __bfloat162float(__float2bfloat16_rn(x));
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Of `count` things, in `unit`s, the ones that a block owns.
struct Share {
  int begin, end;
  __device__ Share(int count, int unit = 1) {
    const int64_t units = count / unit, blocks = gridDim.x, block = blockIdx.x;
    begin = static_cast<int>(block * units / blocks) * unit;
    end = static_cast<int>((block + 1) * units / blocks) * unit;
  }
  __device__ int size() const { return end - begin; }
};

enum class DecoderProduct { in_proj, x_proj, dt_proj, out_proj, head };

// The products of a step in their order: four of each layer, then the head.
template <class W>
class DecoderProducts {
 public:
  // shapes: kDecoderProducts, layers: n_layer; in shared memory, where a layer's addresses are at
  // hand (as arguments they would be fetched from far away, each for the first time). Filled here,
  // there for all behind a barrier.
  __device__ __forceinline__ DecoderProducts(const DecoderArgs& a, ProductShape* shapes,
                                             DecoderLayerArgs* layers)
      : a_(a), shapes_(shapes), layers_(layers) {
    const auto* from = reinterpret_cast<const uint64_t*>(a.layer);
    auto* to = reinterpret_cast<uint64_t*>(layers);
    for (int i = thread_index(); i < a.n_layer * kDecoderLayerBytes / 8; i += kDecoderThreads)
      to[i] = from[i];
    if (threadIdx.x > 0) return;
    constexpr int kBytes = static_cast<int>(sizeof(W)), kPlain = static_cast<int>(sizeof(bf16));
    const Share channels(a.d_inner, 2);
    shapes[0] = {a.d_model * kBytes, channels.begin,           channels.size(), 8, 0,
                 a.d_inner,          (channels.size() + 7) / 8};
    shapes[1] = plain(a.d_inner * kPlain, Share(a.x_proj_rows, 4));
    shapes[2] = plain(a.dt_rank * kPlain, channels);
    shapes[3] = plain(a.d_inner * kBytes, Share(a.d_model));
    shapes[4] = plain(a.d_model * kBytes, Share(a.head ? a.vocab_size : 0));
  }

  __device__ int count() const { return 4 * a_.n_layer + 1; }
  __device__ DecoderProduct kind(int product) const {
    return product == 4 * a_.n_layer ? DecoderProduct::head
                                     : static_cast<DecoderProduct>(product % 4);
  }
  __device__ const ProductShape& shape(DecoderProduct kind) const {
    return shapes_[static_cast<int>(kind)];
  }
  __device__ const ProductShape& shape(int product) const { return shape(kind(product)); }
  __device__ const DecoderLayerArgs& layer(int i) const { return layers_[i]; }
  __device__ const char* matrix(int product) const {
    const DecoderProduct k = kind(product);
    const void* m =
        k == DecoderProduct::head ? a_.head : layers_[product / 4].matrix[static_cast<int>(k)];
    return static_cast<const char*>(m);
  }

 private:
  static __device__ ProductShape plain(int row_bytes, const Share& rows) {
    return {row_bytes,
            rows.begin,
            rows.size(),
            kDecoderTile,
            kDecoderTile / 2,
            kDecoderTile / 2,
            (rows.size() + kDecoderTile - 1) / kDecoderTile};
  }

  const DecoderArgs& a_;
  const ProductShape* shapes_;
  const DecoderLayerArgs* layers_;
};

// A thread's place among those that take over one sequence's values.
template <int kSeqs>
struct SeqThread {
  static constexpr int kThreads = kDecoderThreads / kSeqs;
  const int thread = thread_index(), seq = thread / kThreads, index = thread % kThreads;
  // Of `count` in turn.
  __device__ int share(int count) const { return (count - index + kThreads - 1) / kThreads; }
};

// Zeros behind the `width` elements of a vector, to the end of the last piece, of bytes too.
template <int kSeqs>
__device__ void pad_vector(bf16* x, int width) {
  const SeqThread<kSeqs> me;
  const int end = (width + 127) / 128 * 128;
  for (int i = width + me.index; i < end; i += me.kThreads) x[i] = bf16{};
}

// Vectors of bf16 pairs of all sequences, (num_seqs, width / 2) words, into x.
template <int kSeqs>
__device__ __forceinline__ void take_vectors(const DecoderArgs& a, bf16* x,
                                             const FlaggedWord* words, int width, uint32_t round) {
  constexpr int kBatch = kSeqs == 1 ? 4 : 8;
  const SeqThread<kSeqs> me;
  const bool live = me.seq < a.num_seqs;
  const int fours = live ? me.share(width / 4) : 0;  // of elements: two words
  x += me.seq * a.x_stride;
#pragma unroll 1
  for (int first = 0; first < fours; first += kBatch) {
    const int at = me.index + first * me.kThreads;
    uint4 w[kBatch] = {};
    await_pairs(w, words + me.seq * (width / 2) + 2 * at, 2 * me.kThreads, fours - first, round);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i < fours)
        *reinterpret_cast<uint2*>(x + 4 * (at + i * me.kThreads)) = make_uint2(w[i].x, w[i].z);
  }
  if (live) pad_vector<kSeqs>(x, width);
}

// x_proj's outputs of all sequences: those of dt into x, those of B and C into `x_dbl`
// (num_seqs, x_proj_rows).
template <int kSeqs>
__device__ __forceinline__ void take_x_dbl(const DecoderArgs& a, bf16* x, float* x_dbl,
                                           uint32_t round) {
  constexpr int kBatch = kSeqs == 1 ? 1 : 4;
  const SeqThread<kSeqs> me;
  const bool live = me.seq < a.num_seqs;
  const int pairs = live ? me.share(a.x_proj_rows / 2) : 0;
  x += me.seq * a.x_stride;
  x_dbl += me.seq * a.x_proj_rows;
#pragma unroll 1
  for (int first = 0; first < pairs; first += kBatch) {
    const int at = me.index + first * me.kThreads;
    uint4 w[kBatch] = {};
    await_pairs(w, a.x_dbl + me.seq * a.x_proj_rows + 2 * at, 2 * me.kThreads, pairs - first,
                round);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= pairs) continue;
      const int row = 2 * (at + i * me.kThreads);
      const float low = __uint_as_float(w[i].x), high = __uint_as_float(w[i].z);
      if (row < a.dt_rank)
        *reinterpret_cast<uint32_t*>(x + row) = pack_bf16(low, high);
      else
        *reinterpret_cast<float2*>(x_dbl + row) = make_float2(low, high);
    }
  }
  if (live) pad_vector<kSeqs>(x, a.dt_rank);
}

// The residual stream of all sequences, normed, into x: from the embedding or from the blocks that
// own it. `own`: (num_seqs, max_out_rows): this block's part, filled where the launch
// begins.
template <int kSeqs>
__device__ __forceinline__ void take_residual(const DecoderArgs& a, bf16* x, float* own,
                                              const ProductShape& own_rows, float* partial,
                                              const float* weight, uint32_t round, bool first) {
  constexpr int kPairs = decoder_residual_pairs(kSeqs);
  constexpr int kWarps = kDecoderWarps / kSeqs;  // of a sequence
  const SeqThread<kSeqs> me;
  const bool live = me.seq < a.num_seqs;
  const int pairs = live ? me.share(a.d_model / 2) : 0;
  float2 r[kPairs] = {};
  const auto element = [&](int i) { return 2 * (me.index + i * me.kThreads); };
  const auto weights = [&](int i) { return *reinterpret_cast<const float2*>(weight + element(i)); };
  float2 early[kPairs] = {};  // under way while the residual is awaited, where they fit
  if constexpr (kSeqs == 1) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (i < pairs) early[i] = weights(i);
  }
  if (first && a.embedding) {
    const bf16* row = a.embedding + (live ? static_cast<int64_t>(a.tokens[me.seq]) * a.d_model : 0);
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (i < pairs) {
        const Floats<2> e = load_vector<2>(row + element(i));
        r[i] = make_float2(e[0], e[1]);
      }
  } else {
    constexpr int kBatch = kSeqs == 1 ? 4 : 8;
#pragma unroll
    for (int first_pair = 0; first_pair < kPairs; first_pair += kBatch) {
      if (first_pair >= pairs) break;
      uint4 words[kBatch] = {};
      await_pairs(words, a.residual + me.seq * a.d_model + element(first_pair), 2 * me.kThreads,
                  pairs - first_pair, round);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        r[first_pair + i] = make_float2(__uint_as_float(words[i].x), __uint_as_float(words[i].z));
    }
  }
  // In the same order for every kSeqs: pairs kDecoderThreads apart, 32 neighbours as a tree, then
  // the rest.
  float sum[kSeqs] = {};
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
    if (i < pairs) sum[i % kSeqs] = fmaf(r[i].x, r[i].x, fmaf(r[i].y, r[i].y, sum[i % kSeqs]));
#pragma unroll
  for (int i = 0; i < kSeqs; ++i) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], d);
    if (me.thread % 32 == 0) partial[me.seq * kDecoderWarps + i * kWarps + me.index / 32] = sum[i];
  }
  __syncthreads();  // every warp's sums are there
  float total = 0;
#pragma unroll
  for (int i = 0; i < kDecoderWarps; ++i) total += partial[me.seq * kDecoderWarps + i];
  const float rstd = rsqrtf(total / static_cast<float>(a.d_model) + a.eps);
  x += me.seq * a.x_stride;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if (i >= pairs) continue;
    const float2 g = kSeqs == 1 ? early[i] : weights(i);
    *reinterpret_cast<uint32_t*>(x + element(i)) =
        pack_bf16(r[i].x * rstd * g.x, r[i].y * rstd * g.y);
    for (int k = 0; first && k < 2; ++k)
      if (const int e = element(i) + k; e >= own_rows.first && e < own_rows.first + own_rows.count)
        own[me.seq * a.max_out_rows + e - own_rows.first] = k == 0 ? r[i].x : r[i].y;
  }
  if (live) pad_vector<kSeqs>(x, a.d_model);
}

// The next `tiles` tiles of a product times the vectors in x: each warp's share of the sums to
// `sums` (warps, rows of a group, kSeqs).
template <int kSeqs, class W, class Ring, class Products>
__device__ __forceinline__ void multiply_tiles(const DecoderArgs& a, Ring& ring,
                                               const Products& products, int row_bytes, int tiles,
                                               const bf16* x, float* sums) {
  constexpr int kElements = PieceProduct<W>::kElements;  // of a lane's 16 bytes
  const int thread = thread_index(), lane = thread % 32, g = lane / 4, t = lane % 4;
  const WarpPieces share(row_bytes);
  const bool has_vector = g < a.num_seqs;
  const bf16* vector = x + (has_vector ? g : 0) * a.x_stride + (share.begin * 8 + t) * kElements;
  const auto row = static_cast<uint32_t>(g * kDecoderPieceBytes + t * 16);
  const uint32_t half0 = row + g % 2 * 64, half1 = row + 64 - g % 2 * 64;
  sums += thread / 32 * (decoder_group_rows(kSeqs) * kSeqs) + g * kSeqs;
  for (int tile = 0; tile < tiles; ++tile) {
    float acc[2][4] = {};  // two, since a product waits for the one before it
    const bf16* v = vector;
#pragma unroll 1
    for (int left = share.count; left > 0; --left, v += 8 * kElements) {
      Packed<bf16, kElements> v0{}, v1{};
      if (has_vector) {
        v0 = load_packed<kElements>(v);
        v1 = load_packed<kElements>(v + 4 * kElements);
      }
      const uint32_t piece = ring.take();
      constexpr uint32_t kHigh = 8 * kDecoderPieceBytes;
      const Packed<bf16, 8> low0 = load_copied<bf16, 8>(piece + half0);
      const Packed<bf16, 8> high0 = load_copied<bf16, 8>(piece + half0 + kHigh);
      const Packed<bf16, 8> low1 = load_copied<bf16, 8>(piece + half1);
      const Packed<bf16, 8> high1 = load_copied<bf16, 8>(piece + half1 + kHigh);
      ring.give_back(products);
      PieceProduct<W>::add(acc[0], low0, high0, v0);
      PieceProduct<W>::add(acc[1], low1, high1, v1);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (const int column = 2 * t + k % 2; column < kSeqs)
        sums[(tile * kDecoderTile + k / 2 * 8) * kSeqs + column] = acc[0][k] + acc[1][k];
  }
}

}  // namespace krait::cuda
