// decoder_step: the vectors that matrices are multiplied with, from what other blocks publish.
#pragma once

#include "ops/cuda/exchanged_words.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/decoder_step.cuh"

namespace krait::cuda {

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

// A thread's place among those that take over one sequence's values.
template <int kSeqs>
struct SeqThread {
  static constexpr int kThreads = kDecoderThreads / kSeqs;
  const int thread = thread_index(), seq = thread / kThreads, index = thread % kThreads;
  // Of `count` in turn.
  __device__ int share(int count) const { return (count - index + kThreads - 1) / kThreads; }
};

// What matrices are multiplied with: for each sequence a row of `stride` elements of bf16, or of
// the high and low bytes of as many elements of `scale`.
struct Vectors {
  bf16* x;
  int stride;
  float* scale;    // (kSeqs)
  float* partial;  // (2, kSeqs, warps)
};

// Where word i of a vector of bf16 pairs is kept: of each four the second and third have changed
// places. Words 2 i and 2 i + 1: at bf16_words(i) and two further.
__device__ __forceinline__ int vector_word(int i) { return (i & ~3) | (i & 1) * 2 | (i >> 1 & 1); }
__device__ __forceinline__ int bf16_words(int i) { return vector_word(2 * i); }
// Where the high bytes of elements 4 i to 4 i + 3 are kept, as a word; the low ones four further.
__device__ __forceinline__ int byte_words(int i) {
  return (i & ~3) * 2 + (i & 1) * 2 + (i >> 1 & 1);
}

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
// Of four elements, two pairs of bf16: their high bytes, their low bytes.
__device__ __forceinline__ uint2 high_low(uint32_t pair0, uint32_t pair1, float per_scale) {
  const HighLow b0(low_of(pair0), per_scale), b1(high_of(pair0), per_scale);
  const HighLow b2(low_of(pair1), per_scale), b3(high_of(pair1), per_scale);
  const uint32_t b01 = b1.bytes << 16 | b0.bytes, b23 = b3.bytes << 16 | b2.bytes;
  return make_uint2(__byte_perm(b01, b23, 0x7531), __byte_perm(b01, b23, 0x6420));
}
__device__ __forceinline__ float per_scale_of(float largest) {
  return largest > 0 ? kLargestBytes / largest : 0;
}

// Cycles from where a thread begins to await to its first look for what the others do: where
// weights are half as many bytes and words are what a layer waits for, 1.4B wrote 10 % more with
// them. In bf16 it wrote as much, 130M 3 % less.
inline constexpr int kRestForResidual = 800, kRestForY = 1000;
template <int kSeqs, class W>
__device__ __forceinline__ void rest_before(int cycles, const DecoderArgs& a) {
  if constexpr (kSeqs == 1 && sizeof(W) == 1)
    if (a.streams) rest(cycles);
}

// u or y of all sequences, (num_seqs, width / 2) words of bf16 pairs from word `first_word` of a
// layer's on, into x; in bytes if W is.
template <int kSeqs, class W>
__device__ __forceinline__ void take_vectors(const DecoderArgs& a, const Vectors& to,
                                             const ExchangedWord* words, int first_word,
                                             int width) {
  constexpr int kBatch = kSeqs == 1 ? 2 : 4;
  constexpr bool kBytes = sizeof(W) == 1;
  const SeqThread<kSeqs> me;
  const bool live = me.seq < a.num_seqs;
  const int eights = live ? me.share(width / 8) : 0;  // of elements: four words
  auto* const x = reinterpret_cast<uint4*>(to.x + me.seq * to.stride) + me.index;
  float largest = 0;
  rest_before<kSeqs, W>(kRestForY, a);
#pragma unroll 1
  for (int first = 0; first < eights; first += kBatch) {
    uint4 w[kBatch];
    const int word = first_word + me.seq * (width / 2) + 4 * (me.index + first * me.kThreads);
    await_fours(w, words + decoder_word_place(word), decoder_word_place(4 * me.kThreads),
                eights - first);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= eights) continue;
      x[(first + i) * me.kThreads] = make_uint4(w[i].x, w[i].z, w[i].y, w[i].w);
      if constexpr (kBytes) {
        const float xy = max_magnitude(max_magnitude(low_of(w[i].x), high_of(w[i].x)),
                                       max_magnitude(low_of(w[i].y), high_of(w[i].y)));
        const float zw = max_magnitude(max_magnitude(low_of(w[i].z), high_of(w[i].z)),
                                       max_magnitude(low_of(w[i].w), high_of(w[i].w)));
        largest = max_magnitude(largest, max_magnitude(xy, zw));
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
    // Of 16 elements that lie in 32 bytes one lane writes the high bytes, the next one the low ones
    // (byte_words). Eights come in pairs; a lane may have one less than the first of its warp.
    const int most = __shfl_sync(~0u, eights, 0);
#pragma unroll 2
    for (int i = 0; i < most; ++i) {
      const bool there = i < eights;
      const uint4 w = there ? x[i * me.kThreads] : make_uint4(0, 0, 0, 0);
      const uint2 first = high_low(w.x, w.z, per_scale), second = high_low(w.y, w.w, per_scale);
      const bool is_low = me.index % 2 == 1;
      const uint32_t give0 = is_low ? first.x : first.y, give1 = is_low ? second.x : second.y;
      const uint32_t get0 = __shfl_xor_sync(~0u, give0, 1), get1 = __shfl_xor_sync(~0u, give1, 1);
      if (there)
        x[i * me.kThreads] = is_low ? make_uint4(get0, first.y, get1, second.y)
                                    : make_uint4(first.x, get0, second.x, get1);
    }
  }
}

__device__ __forceinline__ float4 as_floats(const uint4& w) {
  return make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z),
                     __uint_as_float(w.w));
}

// x_proj's outputs of all sequences from a layer's words into `x_dbl` (num_seqs, x_proj_rows).
template <int kSeqs>
__device__ __forceinline__ void take_x_dbl(const DecoderArgs& a, float* x_dbl,
                                           const ExchangedWord* words) {
  constexpr int kBatch = kSeqs == 1 ? 1 : 2;
  const SeqThread<kSeqs> me;
  const int fours = me.seq < a.num_seqs ? me.share(a.x_proj_rows / 4) : 0;
  const int first_row = me.seq * a.x_proj_rows;
#pragma unroll 1
  for (int first = 0; first < fours; first += kBatch) {
    const int at = me.index + first * me.kThreads;
    uint4 w[kBatch];
    await_fours(w, words + decoder_word_place(a.x_dbl + first_row + 4 * at),
                decoder_word_place(4 * me.kThreads), fours - first);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i < fours)
        reinterpret_cast<float4*>(x_dbl + first_row)[at + i * me.kThreads] = as_floats(w[i]);
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
        weight_(reinterpret_cast<const float4*>(weight) + me_.index),
        fours_(me_.seq < a.num_seqs ? me_.share(a.d_model / 4) : 0) {
    if constexpr (kEarly) {
#pragma unroll
      for (int i = 0; i < kFours; ++i)
        if (i < fours_) early_[i] = weight_[i * me_.kThreads];
    }
  }

  __device__ __forceinline__ void take(const Vectors& to, const bf16* embedding,
                                       const ExchangedWord* words) {
    constexpr int kWarps = kDecoderWarps / kSeqs;  // of a sequence
    float4 x[kFours] = {};
    if (embedding)
      read(x, embedding);
    else
      await(x, words);
    // In the same order for every kSeqs: fours kDecoderThreads apart, 32 neighbours as a tree, then
    // the rest.
    float sum[kSeqs] = {}, largest = 0;
#pragma unroll
    for (int i = 0; i < kFours; ++i)
      if (i < fours_) {
        float& s = sum[i % kSeqs];
        s = fmaf(x[i].w, x[i].w, s);
        s = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, fmaf(x[i].z, x[i].z, s)));
        const float4 g = kEarly ? early_[i] : weight_[i * me_.kThreads];
        x[i] = make_float4(x[i].x * g.x, x[i].y * g.y, x[i].z * g.z, x[i].w * g.w);
        if constexpr (kBytes)
          largest = max_magnitude(
              largest, max_magnitude(max_magnitude(x[i].x, x[i].y), max_magnitude(x[i].z, x[i].w)));
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
      store_bytes(to, x, rstd, per_scale_of(largest));
    } else {
      store_bf16(to, x, rstd);
    }
  }

 private:
  static constexpr int kFours = decoder_residual_fours(kSeqs);
  static constexpr bool kBytes = sizeof(W) == 1;
  static constexpr bool kEarly = kSeqs == 1;  // weights fit into registers while words are awaited

  __device__ __forceinline__ void read(float4 (&x)[kFours], const bf16* embedding) const {
    if (fours_ == 0) return;
    const bf16* row =
        embedding + static_cast<int64_t>(a_.tokens[me_.seq]) * a_.d_model + 4 * me_.index;
#pragma unroll
    for (int i = 0; i < kFours; ++i)
      if (i < fours_) {
        const Floats<4> e = load_vector<4>(row + 4 * i * me_.kThreads);
        x[i] = make_float4(e[0], e[1], e[2], e[3]);
      }
  }
  __device__ __forceinline__ void await(float4 (&x)[kFours], const ExchangedWord* words) const {
    constexpr int kBatch = 4;
    rest_before<kSeqs, W>(kRestForResidual, a_);
    const ExchangedWord* const from =
        words + decoder_word_place(a_.residual + me_.seq * a_.d_model + 4 * me_.index);
#pragma unroll
    for (int first = 0; first < kFours; first += kBatch) {
      if (first >= fours_) break;
      uint4 w[kBatch];
      await_fours(w, from + decoder_word_place(4 * first * me_.kThreads),
                  decoder_word_place(4 * me_.kThreads), fours_ - first);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[first + i] = as_floats(w[i]);
    }
  }
  __device__ __forceinline__ uint32_t* words_of(const Vectors& to) const {
    return reinterpret_cast<uint32_t*>(to.x + me_.seq * to.stride);
  }
  __device__ __forceinline__ void store_bf16(const Vectors& to, const float4 (&x)[kFours],
                                             float rstd) const {
    uint32_t* const words = words_of(to);
#pragma unroll
    for (int i = 0; i < kFours; ++i)
      if (i < fours_) {
        uint32_t* const word = words + bf16_words(me_.index + i * me_.kThreads);
        word[0] = pack_bf16(x[i].x * rstd, x[i].y * rstd);
        word[2] = pack_bf16(x[i].z * rstd, x[i].w * rstd);
      }
  }
  __device__ __forceinline__ void store_bytes(const Vectors& to, const float4 (&x)[kFours],
                                              float rstd, float per_scale) const {
    uint32_t* const words = words_of(to);
#pragma unroll
    for (int i = 0; i < kFours; ++i)
      if (i < fours_) {
        uint32_t* const word = words + byte_words(me_.index + i * me_.kThreads);
        const uint2 b = high_low(pack_bf16(x[i].x * rstd, x[i].y * rstd),
                                 pack_bf16(x[i].z * rstd, x[i].w * rstd), per_scale);
        word[0] = b.x;
        word[4] = b.y;
      }
  }

  const DecoderArgs& a_;
  const SeqThread<kSeqs> me_;
  const float4* const weight_;
  const int fours_;
  float4 early_[kFours] = {};
};

}  // namespace krait::cuda
