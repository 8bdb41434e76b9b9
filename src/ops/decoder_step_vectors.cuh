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
// Magnitudes are in order as their bits are; those of no numbers are the largest.
__device__ __forceinline__ float warp_max(float magnitude) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(magnitude)));
}
// Of pairs of bf16, each half by itself.
__device__ __forceinline__ uint32_t max_magnitudes(uint32_t most, uint32_t a, uint32_t b) {
  return __vimax3_u16x2(most, a & 0x7fff7fffu, b & 0x7fff7fffu);
}
__device__ __forceinline__ float larger_of(uint32_t magnitudes) {
  return __uint_as_float(max(magnitudes << 16, magnitudes & 0xffff0000u));
}
// from: aligned to so many floats, or to four.
template <int kCount>
__device__ __forceinline__ float largest_of(const float* from) {
  constexpr int kVector = kCount < 4 ? kCount : 4;
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += kVector) {
    const Floats<kVector> x = load_vector<kVector>(from + i);
#pragma unroll
    for (int k = 0; k < kVector; ++k) most = max(most, __float_as_uint(x[k]));
  }
  return __uint_as_float(most);
}

// An element in units of its vector's scale, to nearest even: 256 high + low. The largest of a
// vector has kLargestBytes, or by later rounding to bf16 a little more: |high| <= 127.
inline constexpr float kLargestBytes = 32000;
struct HighLow {
  uint32_t high, low;  // the second byte of the one, the first of the other
  // At 1.5 * 2^23 the last bit of a float counts 1; conversions run at a quarter of the rate.
  __device__ __forceinline__ HighLow(float x, float per_scale) {
    high = __float_as_uint(fmaf(x, per_scale, 12582912.0f + 128.0f));
    low = __float_as_uint(fmaf(x, per_scale, 12582912.0f));
  }
};
// Of four elements, two pairs of bf16: their high bytes, their low bytes.
__device__ __forceinline__ uint2 high_low(uint32_t pair0, uint32_t pair1, float per_scale) {
  const HighLow b0(low_of(pair0), per_scale), b1(high_of(pair0), per_scale);
  const HighLow b2(low_of(pair1), per_scale), b3(high_of(pair1), per_scale);
  return make_uint2(
      __byte_perm(__byte_perm(b0.high, b1.high, 0x51), __byte_perm(b2.high, b3.high, 0x51), 0x5410),
      __byte_perm(__byte_perm(b0.low, b1.low, 0x40), __byte_perm(b2.low, b3.low, 0x40), 0x5410));
}
__device__ __forceinline__ float per_scale_of(float largest) {
  float inverse;
  asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(largest));
  return largest > 0 ? kLargestBytes * inverse : 0;
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

// Of 16 elements that lie in 32 bytes one lane writes the high bytes, the next one the low ones
// (byte_words). w: a lane's eight, of bf16 pairs whose second and third have changed places; 0
// where there are none. By the whole warp.
__device__ __forceinline__ uint4 in_bytes(const uint4& w, float per_scale, bool is_low) {
  const uint2 first = high_low(w.x, w.z, per_scale), second = high_low(w.y, w.w, per_scale);
  const uint32_t give0 = is_low ? first.x : first.y, give1 = is_low ? second.x : second.y;
  const uint32_t get0 = __shfl_xor_sync(~0u, give0, 1), get1 = __shfl_xor_sync(~0u, give1, 1);
  return is_low ? make_uint4(get0, first.y, get1, second.y)
                : make_uint4(first.x, get0, second.x, get1);
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
  // Of the first of the warp, which has as many as any: eights come in pairs, a lane may have one
  // less.
  const int most = kBytes ? __shfl_sync(~0u, eights, 0) : eights;
  auto* const x = reinterpret_cast<uint4*>(to.x + me.seq * to.stride) + me.index;
  uint32_t magnitudes = 0;
  uint4 w[kBatch]{};
  int first = 0;
  rest_before<kSeqs, W>(kRestForY, a);
#pragma unroll 1
  for (; first < most; first += kBatch) {
    const int word = first_word + me.seq * (width / 2) + 4 * (me.index + first * me.kThreads);
    await_fours(w, words + decoder_word_place(word), decoder_word_place(4 * me.kThreads),
                eights - first);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      w[i] = make_uint4(w[i].x, w[i].z, w[i].y, w[i].w);
      // What becomes bytes anyhow stays where it is.
      if (first + i < eights && (!kBytes || first + kBatch < most))
        x[(first + i) * me.kThreads] = w[i];
      if constexpr (kBytes) {
        magnitudes = max_magnitudes(magnitudes, w[i].x, w[i].y);
        magnitudes = max_magnitudes(magnitudes, w[i].z, w[i].w);
      }
    }
  }
  if constexpr (kBytes) {
    float largest = warp_max(larger_of(magnitudes));
    if (me.thread % 32 == 0) to.partial[me.thread / 32] = largest;
    sync_multipliers();                            // every warp's is there
    constexpr int kWarps = kDecoderWarps / kSeqs;  // of a sequence
    largest = largest_of<kWarps>(to.partial + me.seq * kWarps);
    const float per_scale = per_scale_of(largest);
    if (me.index == 0) to.scale[me.seq] = largest * (1 / kLargestBytes);
    const bool is_low = me.index % 2 == 1;
    const int waiting = max(first - kBatch, 0);
#pragma unroll 1
    for (int i = 0; i < waiting; ++i) {
      const bool there = i < eights;
      const uint4 bytes = in_bytes(there ? x[i * me.kThreads] : uint4{}, per_scale, is_low);
      if (there) x[i * me.kThreads] = bytes;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (waiting + i >= most) break;
      const uint4 bytes = in_bytes(w[i], per_scale, is_low);
      if (waiting + i < eights) x[(waiting + i) * me.kThreads] = bytes;
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
  // weight: of the norm.
  __device__ __forceinline__ ResidualTaker(const DecoderArgs& a, const float* weight)
      : a_(a),
        weight_(reinterpret_cast<const float4*>(weight) + me_.index),
        fours_(me_.seq < a.num_seqs ? me_.share(a.d_model / 4) : 0) {}

  __device__ __forceinline__ void take(const Vectors& to, const bf16* embedding,
                                       const ExchangedWord* words) {
    constexpr int kWarps = kDecoderWarps / kSeqs;  // of a sequence
    // In the same order for every kSeqs: fours kDecoderThreads apart, 32 neighbours as a tree, then
    // the rest.
    Values x = {};
    if (embedding) read(x, embedding);
    float sum[kSeqs] = {}, largest = 0;
#pragma unroll
    for (int first = 0; first < kFours; first += kBatch) {
      if (first >= fours_) break;
      float4 weight[kBatch] = {};  // asked for before words are awaited
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (first + i < fours_) weight[i] = weight_[(first + i) * me_.kThreads];
      float4(&batch)[kBatch] = x[first / kBatch];
      if (!embedding) await(batch, words, first);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= fours_) break;
        float& s = sum[(first + i) % kSeqs];
        float4& r = batch[i];
        s = fmaf(r.w, r.w, s);
        s = fmaf(r.x, r.x, fmaf(r.y, r.y, fmaf(r.z, r.z, s)));
        const float4 g = weight[i];
        r = make_float4(r.x * g.x, r.y * g.y, r.z * g.z, r.w * g.w);
        if constexpr (kBytes)
          largest = max_magnitude(largest,
                                  max_magnitude(max_magnitude(r.x, r.y), max_magnitude(r.z, r.w)));
      }
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
      largest = largest_of<kWarps>(magnitudes + me_.seq * kWarps) * rstd;
      if (me_.index == 0) to.scale[me_.seq] = largest * (1 / kLargestBytes);
      store_bytes(to, x, rstd, per_scale_of(largest));
    } else {
      store_bf16(to, x, rstd);
    }
  }

 private:
  static constexpr int kFours = decoder_residual_fours(kSeqs);
  static constexpr bool kBytes = sizeof(W) == 1;
  static constexpr int kBatch = 4;  // fours that are awaited together
  using Values = float4[kFours / kBatch][kBatch];

  __device__ __forceinline__ void read(Values& x, const bf16* embedding) const {
    if (fours_ == 0) return;
    const bf16* row =
        embedding + static_cast<int64_t>(a_.tokens[me_.seq]) * a_.d_model + 4 * me_.index;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      if (i >= fours_) break;
      const Floats<4> e = load_vector<4>(row + 4 * i * me_.kThreads);
      x[i / kBatch][i % kBatch] = make_float4(e[0], e[1], e[2], e[3]);
    }
  }
  // Fours from number `first` on.
  __device__ __forceinline__ void await(float4 (&x)[kBatch], const ExchangedWord* words,
                                        int first) const {
    if (first == 0) rest_before<kSeqs, W>(kRestForResidual, a_);
    const ExchangedWord* const from =
        words + decoder_word_place(a_.residual + me_.seq * a_.d_model + 4 * me_.index);
    uint4 w[kBatch];
    await_fours(w, from + decoder_word_place(4 * first * me_.kThreads),
                decoder_word_place(4 * me_.kThreads), fours_ - first);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) x[i] = as_floats(w[i]);
  }
  __device__ __forceinline__ uint32_t* words_of(const Vectors& to) const {
    return reinterpret_cast<uint32_t*>(to.x + me_.seq * to.stride);
  }
  __device__ __forceinline__ void store_bf16(const Vectors& to, const Values& x, float rstd) const {
    uint32_t* const words = words_of(to);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      if (i >= fours_) break;
      const float4& r = x[i / kBatch][i % kBatch];
      uint32_t* const word = words + bf16_words(me_.index + i * me_.kThreads);
      word[0] = pack_bf16(r.x * rstd, r.y * rstd);
      word[2] = pack_bf16(r.z * rstd, r.w * rstd);
    }
  }
  __device__ __forceinline__ void store_bytes(const Vectors& to, const Values& x, float rstd,
                                              float per_scale) const {
    uint32_t* const words = words_of(to);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      if (i >= fours_) break;
      const float4& r = x[i / kBatch][i % kBatch];
      uint32_t* const word = words + byte_words(me_.index + i * me_.kThreads);
      const uint2 b =
          high_low(pack_bf16(r.x * rstd, r.y * rstd), pack_bf16(r.z * rstd, r.w * rstd), per_scale);
      word[0] = b.x;
      word[4] = b.y;
    }
  }

  const DecoderArgs& a_;
  const SeqThread<kSeqs> me_;
  const float4* const weight_;
  const int fours_;
};

}  // namespace krait::cuda
