// What a block that samples from one row works with: keys, what is on chip, passes over the row.
#pragma once

#include "core/rng.h"
#include "ops/cuda/vector.cuh"
#include "ops/sample.h"
#include "ops/sample_plan.h"
#include "ops/sample_weight.h"

namespace krait::cuda {

inline constexpr int kSampleWarps = kSampleThreads / 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr uint32_t kNoId = 0xffffffffu;
inline constexpr float kLargestLogit = 3.402823466e+38f;

// Orders as the logits do; -0 as 0.
__device__ inline uint32_t key_of(float logit) {
  const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.f));
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ inline float logit_of(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}
inline constexpr uint32_t kKeyOfMinusInfinity = 0x007fffffu;

// A candidate: more likely ones, and of equal ones lower ids, are greater.
__device__ inline uint64_t pair_of(uint32_t key, uint32_t id) {
  return (uint64_t{key} << 32) | (0xffffffffu - id);
}
__device__ inline uint32_t key_of_pair(uint64_t pair) { return static_cast<uint32_t>(pair >> 32); }
__device__ inline uint32_t id_of_pair(uint64_t pair) {
  return 0xffffffffu - static_cast<uint32_t>(pair);
}

struct SampleShared {
  SampledSequence sequence;
  int64_t place;  // of the next token among the recent ones
  uint32_t warp_key[kSampleWarps], warp_id[kSampleWarps], warp_bad[kSampleWarps];
  alignas(16) uint32_t group_key[kSampleGroups];  // highest of each group
  uint32_t bound;                                 // the top_k-th highest of these
  uint64_t warp_sum[kSampleWarps];
  uint32_t warp_ties[kSampleWarps];
  uint64_t random53;
  double log2_per_logit;
  int count;  // of candidates that were found, of which the list holds the first
  uint64_t list[kSampleList], weight[kSampleList];
  int bin;
  uint64_t before;               // sum of the bins before `bin`
  uint32_t kept_key, kept_ties;  // tokens of a higher key are kept, and of that key the lowest ids
  int32_t token;
};

template <int V>
struct SampleLogits {
  const float* logits;
  int vocab, top_k;  // top_k at most vocab
  float top_p;
  double log_min_p;
  uint64_t* bins;
  SampleShared& shared;
  float max_logit = 0;
  uint32_t own_key = 0;  // the highest among this thread's logits

  // f(id, vector) for those logits that are this thread's, the same ones each time, by rising id.
  template <class F>
  __device__ void for_each_vector(F f) const {
    constexpr int kTogether = 8;  // loads in flight
    const int vectors = vocab / V;
    for (int i = threadIdx.x; i < vectors; i += kTogether * kSampleThreads) {
      Floats<V> x[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u)
        if (i + u * kSampleThreads < vectors)
          x[u] = load_vector<V>(logits + (i + u * kSampleThreads) * V);
#pragma unroll
      for (int u = 0; u < kTogether; ++u)
        if (i + u * kSampleThreads < vectors) f((i + u * kSampleThreads) * V, x[u]);
    }
    const int tail = vectors * V + static_cast<int>(threadIdx.x);
    if (tail < vocab) f(tail, load_vector<1>(logits + tail));
  }
  // f(id, logit), the same.
  template <class F>
  __device__ void for_each_logit(F f) const {
    for_each_vector([&]<int N>(int id, const Floats<N>& x) {
#pragma unroll
      for (int k = 0; k < N; ++k) f(id + k, x[k]);
    });
  }

  // The list of all finite logits that `wanted` is true of, if there is room; shared.count says.
  template <class F>
  __device__ void collect(uint32_t least, F wanted) {
    __syncthreads();  // the list and its length are free
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();  // the length is zero
    if (own_key >= least) {
      const float least_logit = logit_of(max(least, kKeyOfMinusInfinity));
      for_each_vector([&]<int N>(int id, const Floats<N>& x) {
        float most = x[0];
#pragma unroll
        for (int k = 1; k < N; ++k) most = fmaxf(most, x[k]);
        if (most < least_logit) return;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const uint32_t key = key_of(x[k]);
          if (key <= kKeyOfMinusInfinity || !wanted(key, x[k])) continue;
          const int at = atomicAdd(&shared.count, 1);
          if (at < kSampleList) shared.list[at] = pair_of(key, static_cast<uint32_t>(id + k));
        }
      });
    }
    __syncthreads();  // the list is there
  }

  __device__ uint64_t weight_of(float logit, double scale) const {
    return sampling_weight(logit, max_logit, scale);
  }
  // The least logit that is not below the highest one and log_min_p.
  __device__ float least_by_min_p() const {
    return __double2float_ru(static_cast<double>(max_logit) + log_min_p);
  }
};

}  // namespace krait::cuda
