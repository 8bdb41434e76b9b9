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
  void *conv, *ssm;
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
  // Rounds so far, one a layer. They wrap after 2^32 (half a day of writing): a word of a sequence
  // that has been absent so long is taken for a new one if it is as many layers old to the layer.
  uint32_t* round;
  FlaggedWord *residual, *u, *y, *x_dbl;
  DecoderShared shared;
  int num_seqs, d_model, d_inner, d_state, dt_rank, x_proj_rows, vocab_size;
  int x_stride, max_channels, max_out_rows;
  float eps, per_d_model;  // per_d_model: 1 / d_model
  bool residual_f32, bf16_states;
};

__device__ __forceinline__ float round_bf16(float x) {
  return __bfloat162float(__float2bfloat16_rn(x));
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// Where states begin, of f32 or bf16.
struct StatesAt {
  void* states = nullptr;  // null: none
  bool is_bf16;

  __device__ __forceinline__ StatesAt operator+(int64_t i) const {
    return {static_cast<char*>(states) + i * (is_bf16 ? 2 : 4), is_bf16};
  }
};
template <int V>
__device__ __forceinline__ Floats<V> load_states(const StatesAt& from) {
  return from.is_bf16 ? load_vector<V>(static_cast<const bf16*>(from.states))
                      : load_vector<V>(static_cast<const float*>(from.states));
}
template <int V>
__device__ __forceinline__ void store_states(const StatesAt& to, const Floats<V>& x) {
  if (to.is_bf16)
    store_vector<V>(static_cast<bf16*>(to.states), x);
  else
    store_vector<V>(static_cast<float*>(to.states), x);
}

// Of `count` things, in `unit`s, the ones that a block owns.
struct Share {
  int begin, end;
  __device__ Share(int count, int unit = 1) {
    const auto blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    begin = block * (count / unit) / blocks * unit;
    end = (block + 1) * (count / unit) / blocks * unit;
  }
  __device__ int size() const { return end - begin; }
};

enum class DecoderProduct { in_proj, x_proj, dt_proj, out_proj, head };

// The products of a step in their order: four of each layer, then the head.
template <class W>
class DecoderProducts {
 public:
  // shapes: kDecoderProducts, layers: n_layer; in shared memory, where a layer's addresses are at
  // hand (as arguments they would be fetched from far away, each for the first time).
  __device__ __forceinline__ DecoderProducts(const DecoderArgs& a, char* memory)
      : a_(a),
        shapes_(reinterpret_cast<ProductShape*>(memory + a.shared.shapes)),
        layers_(reinterpret_cast<DecoderLayerArgs*>(memory + a.shared.layers)) {}

  // By the whole block, there for all behind a barrier.
  __device__ __forceinline__ void fill() const {
    const DecoderArgs& a = a_;
    const auto* from = reinterpret_cast<const uint64_t*>(a.layer);
    auto* to = reinterpret_cast<uint64_t*>(layers_);
    const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int i = thread; i < a.n_layer * kDecoderLayerBytes / 8; i += threads) to[i] = from[i];
    if (thread > 0) return;
    constexpr int kBytes = static_cast<int>(sizeof(W)), kPlain = static_cast<int>(sizeof(bf16));
    const Share channels(a.d_inner, 2);
    shapes_[0] = {a.d_model * kBytes, channels.begin,           channels.size(), 8, 0,
                  a.d_inner,          (channels.size() + 7) / 8};
    shapes_[1] = plain(a.d_inner * kPlain, Share(a.x_proj_rows, 4));
    shapes_[2] = plain(a.dt_rank * kPlain, channels);
    shapes_[3] = plain(a.d_inner * kBytes, Share(a.d_model));
    shapes_[4] = plain(a.d_model * kBytes, Share(a.head ? a.vocab_size : 0));
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
  ProductShape* const shapes_;
  DecoderLayerArgs* const layers_;
};

// A thread's place among those that take over one sequence's values.
template <int kSeqs>
struct SeqThread {
  static constexpr int kThreads = kDecoderThreads / kSeqs;
  const int thread = thread_index(), seq = thread / kThreads, index = thread % kThreads;
  // Of `count` in turn.
  __device__ int share(int count) const { return (count - index + kThreads - 1) / kThreads; }
};

// What matrices are multiplied with: for each sequence a row of x_stride elements of bf16, or of
// the high and low bytes of as many elements of `scale`.
struct Vectors {
  bf16* x;
  float* scale;    // (kSeqs)
  float* partial;  // (2, kSeqs, warps)
};

// Largest magnitude, or no number if one is none.
__device__ __forceinline__ float max_magnitude(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(fabsf(a)), "f"(fabsf(b)));
  return m;
}
__device__ __forceinline__ float warp_max(float m) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) m = max_magnitude(m, __shfl_xor_sync(~0u, m, d));
  return m;
}

// An element in units of its vector's scale, to nearest even: 256 high + low. The largest of a
// vector has kLargestBytes, or by later rounding to bf16 a little more: |high| <= 127.
inline constexpr float kLargestBytes = 32000;
struct HighLow {
  uint32_t bytes;  // high in the second byte, low in the first
  __device__ __forceinline__ HighLow(float x, float per_scale) {
    // At 1.5 * 2^23 the last bit of a float counts 1; conversions run at a quarter of the rate.
    const uint32_t q = __float_as_uint(fmaf(x, per_scale, 12582912.0f));
    bytes = ((q + 128) & 0xff00u) | (q & 0xffu);
  }
};
__device__ __forceinline__ float per_scale_of(float largest) {
  return largest > 0 ? kLargestBytes / largest : 0;
}

// u or y of all sequences, (num_seqs, width / 2) words of bf16 pairs, into x; in bytes if W is.
template <int kSeqs, class W>
__device__ __forceinline__ void take_vectors(const DecoderArgs& a, const Vectors& to,
                                             const FlaggedWord* words, int width, uint32_t round) {
  constexpr int kBatch = kSeqs == 1 ? 4 : 8;
  constexpr bool kBytes = sizeof(W) == 1;
  const SeqThread<kSeqs> me;
  const bool live = me.seq < a.num_seqs;
  const int fours = live ? me.share(width / 4) : 0;  // of elements: two words
  auto* const x = reinterpret_cast<uint32_t*>(to.x + me.seq * a.x_stride) +
                  (kBytes ? byte_words(me.index) : bf16_words(me.index));
  constexpr int kSecond = kBytes ? 4 : 2;
  float largest = 0;
#pragma unroll 1
  for (int first = 0; first < fours; first += kBatch) {
    const int at = me.index + first * me.kThreads;
    uint4 w[kBatch] = {};
    await_pairs(w, words + me.seq * (width / 2) + 2 * at, 2 * me.kThreads, fours - first, round);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i < fours) {
        uint32_t* const word = x + 2 * (first + i) * me.kThreads;
        word[0] = w[i].x;
        word[kSecond] = w[i].z;
        if constexpr (kBytes) {
          largest = max_magnitude(largest, max_magnitude(low_of(w[i].x), high_of(w[i].x)));
          largest = max_magnitude(largest, max_magnitude(low_of(w[i].z), high_of(w[i].z)));
        }
      }
  }
  if constexpr (kBytes) {
    largest = warp_max(largest);
    if (me.thread % 32 == 0) to.partial[me.thread / 32] = largest;
    sync_multipliers();                            // every warp's is there
    constexpr int kWarps = kDecoderWarps / kSeqs;  // of a sequence
#pragma unroll
    for (int i = 0; i < kWarps; ++i)
      largest = max_magnitude(largest, to.partial[me.seq * kWarps + i]);
    const float per_scale = per_scale_of(largest);
    if (me.index == 0) to.scale[me.seq] = largest / kLargestBytes;
#pragma unroll 4
    for (int i = 0; i < fours; ++i) {
      uint32_t* const word = x + 2 * i * me.kThreads;
      const HighLow b0(low_of(word[0]), per_scale), b1(high_of(word[0]), per_scale);
      const HighLow b2(low_of(word[kSecond]), per_scale), b3(high_of(word[kSecond]), per_scale);
      const uint32_t b01 = b1.bytes << 16 | b0.bytes, b23 = b3.bytes << 16 | b2.bytes;
      word[0] = __byte_perm(b01, b23, 0x7531);
      word[kSecond] = __byte_perm(b01, b23, 0x6420);
    }
  }
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
  auto* const words = reinterpret_cast<uint32_t*>(x + me.seq * a.x_stride) + vector_word(me.index);
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
        words[(first + i) * me.kThreads] = pack_bf16(low, high);
      else
        *reinterpret_cast<float2*>(x_dbl + row) = make_float2(low, high);
    }
  }
}

// The residual stream of all sequences, normed, into x: from the embedding where that is given, or
// from the blocks that own it.
template <int kSeqs, class W>
class ResidualTaker {
 public:
  // Asks for the weights of the norm.
  __device__ __forceinline__ ResidualTaker(const DecoderArgs& a, const float* weight)
      : a_(a),
        weight_(reinterpret_cast<const float2*>(weight) + me_.index),
        pairs_(me_.seq < a.num_seqs ? me_.share(a.d_model / 2) : 0) {
    if constexpr (kEarly) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        if (i < pairs_) early_[i] = weight_[i * me_.kThreads];
    }
  }

  __device__ __forceinline__ void take(const Vectors& to, const bf16* embedding, uint32_t round) {
    constexpr int kWarps = kDecoderWarps / kSeqs;  // of a sequence
    float2 x[kPairs] = {};
    if (embedding)
      read(x, embedding);
    else
      await(x, round);
    // In the same order for every kSeqs: pairs kDecoderThreads apart, 32 neighbours as a tree, then
    // the rest.
    float sum[kSeqs] = {}, largest = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (i < pairs_) {
        sum[i % kSeqs] = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, sum[i % kSeqs]));
        const float2 g = kEarly ? early_[i] : weight_[i * me_.kThreads];
        x[i] = make_float2(x[i].x * g.x, x[i].y * g.y);
        if constexpr (kBytes) largest = max_magnitude(largest, max_magnitude(x[i].x, x[i].y));
      }
#pragma unroll
    for (int i = 0; i < kSeqs; ++i) {
#pragma unroll
      for (int d = 16; d > 0; d /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], d);
      if (me_.thread % 32 == 0)
        to.partial[me_.seq * kDecoderWarps + i * kWarps + me_.index / 32] = sum[i];
    }
    float* const magnitudes = to.partial + kSeqs * kDecoderWarps;
    if constexpr (kBytes) {
      largest = warp_max(largest);
      if (me_.thread % 32 == 0) magnitudes[me_.thread / 32] = largest;
    }
    sync_multipliers();  // every warp's sums are there
    float total = 0;
#pragma unroll
    for (int i = 0; i < kDecoderWarps; ++i) total += to.partial[me_.seq * kDecoderWarps + i];
    const float rstd = rsqrtf(fmaf(total, a_.per_d_model, a_.eps));
    if constexpr (kBytes) {
#pragma unroll
      for (int i = 0; i < kWarps; ++i)
        largest = max_magnitude(largest, magnitudes[me_.seq * kWarps + i]);
      largest *= rstd;
      if (me_.index == 0) to.scale[me_.seq] = largest / kLargestBytes;
      store_bytes(to.x, x, rstd, per_scale_of(largest));
    } else {
      store_bf16(to.x, x, rstd);
    }
  }

 private:
  static constexpr int kPairs = decoder_residual_pairs(kSeqs);
  static constexpr bool kBytes = sizeof(W) == 1;
  static constexpr bool kEarly = kSeqs == 1;  // weights fit into registers while words are awaited

  __device__ __forceinline__ void read(float2 (&x)[kPairs], const bf16* embedding) const {
    if (pairs_ == 0) return;
    const bf16* row =
        embedding + static_cast<int64_t>(a_.tokens[me_.seq]) * a_.d_model + 2 * me_.index;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (i < pairs_) {
        const Floats<2> e = load_vector<2>(row + 2 * i * me_.kThreads);
        x[i] = make_float2(e[0], e[1]);
      }
  }
  __device__ __forceinline__ void await(float2 (&x)[kPairs], uint32_t round) const {
    constexpr int kBatch = kSeqs == 1 ? 4 : 8;
    const FlaggedWord* from = a_.residual + me_.seq * a_.d_model + 2 * me_.index;
#pragma unroll
    for (int first = 0; first < kPairs; first += kBatch) {
      if (first >= pairs_) break;
      uint4 words[kBatch] = {};
      await_pairs(words, from + 2 * first * me_.kThreads, 2 * me_.kThreads, pairs_ - first, round);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        x[first + i] = make_float2(__uint_as_float(words[i].x), __uint_as_float(words[i].z));
    }
  }
  __device__ __forceinline__ void store_bf16(bf16* to, const float2 (&x)[kPairs],
                                             float rstd) const {
    auto* const words =
        reinterpret_cast<uint32_t*>(to + me_.seq * a_.x_stride) + vector_word(me_.index);
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (i < pairs_) words[i * me_.kThreads] = pack_bf16(x[i].x * rstd, x[i].y * rstd);
  }
  __device__ __forceinline__ void store_bytes(bf16* to, const float2 (&x)[kPairs], float rstd,
                                              float per_scale) const {
    // A pair is half a word.
    auto* const halves = reinterpret_cast<uint16_t*>(to + me_.seq * a_.x_stride) +
                         2 * byte_words(me_.index / 2) + me_.index % 2;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (i < pairs_) {
        const HighLow a(round_bf16(x[i].x * rstd), per_scale);
        const HighLow b(round_bf16(x[i].y * rstd), per_scale);
        halves[2 * i * me_.kThreads] = static_cast<uint16_t>(__byte_perm(a.bytes, b.bytes, 0x51));
        halves[2 * i * me_.kThreads + 8] =
            static_cast<uint16_t>(__byte_perm(a.bytes, b.bytes, 0x40));
      }
  }

  const DecoderArgs& a_;
  const SeqThread<kSeqs> me_;
  const float2* const weight_;
  const int pairs_;
  float2 early_[kPairs] = {};
};

// What a lane multiplies of each piece: kRuns times 16 bytes of a low and of a high row.
template <int kSeqs, class W>
class TileMultiplier {
 public:
  __device__ __forceinline__ TileMultiplier(const DecoderArgs& a, const bf16* x)
      : first_(thread_index() / 32 % kGroupWarps * 64 + thread_index() % 4 * 16) {
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const int seq = Product::seq_of(g(), set);
      has_vector_[set] = seq < a.num_seqs;
      x_[set] = reinterpret_cast<const char*>(x + (has_vector_[set] ? seq : 0) * a.x_stride) +
                first_ * Product::kVectorBytes + Product::offset_of(g());
    }
  }

  // The next `tiles` tiles of a product times the vectors: each warp's share of the sums to `sums`
  // (warps, rows of a group, kSeqs).
  __device__ __forceinline__ void multiply(WeightReader& weights, int row_bytes, int tiles,
                                           float* sums) const {
    const int pieces = (row_bytes + kDecoderPieceBytes - 1) / kDecoderPieceBytes;
    sums += thread_index() / 32 * (decoder_group_rows(kSeqs) * kSeqs) + g() * kSeqs;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile, sums += kDecoderTile * kSeqs) {
      Sums low[kSets] = {}, high[kSets] = {};
#pragma unroll 1
      while (weights.next() < pieces) {
        const int at = weights.next() * kDecoderPieceBytes, left = row_bytes - at;
        if (left >= kDecoderPieceBytes)
          multiply_piece<true>(low, high, weights, at, 0);
        else
          multiply_piece<false>(low, high, weights, at, left - first_);
      }
      weights.end_tile(pieces);
      Product::store(sums, thread_index() % 4, low);
      Product::store(sums + 8 * kSeqs, thread_index() % 4, high);
    }
  }

 private:
  using Product = RowProduct<W, kSeqs>;
  using Sums = typename Product::Sums;
  static constexpr int kSets = Product::kSets;
  static constexpr int kGroupWarps = kDecoderWarps / kDecoderGroups;
  static constexpr int kStep = 64 * kGroupWarps;  // bytes of a row from run to run
  static constexpr int kRuns = kDecoderPieceBytes / kStep;

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
    for (int i = 0; i < kRuns; ++i)
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        Product::add(low[set], low_row[i], x[i][set]);
        Product::add(high[set], high_row[i], x[i][set]);
      }
    weights.give_back();
  }

  const int first_;  // byte of a row
  bool has_vector_[kSets];
  const char* x_[kSets];
};

}  // namespace krait::cuda
