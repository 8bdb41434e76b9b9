// A block samples from one row: which tokens are kept, and which of them is drawn.
#pragma once

#include "ops/sample_whole_row.cuh"

namespace krait::cuda {

template <int V>
struct SampleRow : SampleLogits<V> {
  using SampleLogits<V>::logits, SampleLogits<V>::max_logit, SampleLogits<V>::own_key;
  using SampleLogits<V>::shared, SampleLogits<V>::top_k, SampleLogits<V>::top_p;
  using SampleLogits<V>::vocab;
  using SampleLogits<V>::collect, SampleLogits<V>::for_each_logit;
  using SampleLogits<V>::for_each_vector, SampleLogits<V>::least_by_min_p;
  using SampleLogits<V>::weight_of;

  // The first token of the highest logit, or what is wrong and where.
  __device__ Picked find_highest(int32_t& token) {
    float highest = logit_of(kKeyOfMinusInfinity);
    int at = vocab;  // first id of the first vector that has it
    bool any_bad = false;
    for_each_vector([&]<int N>(int id, const Floats<N>& x) {
      float most = x[0];  // NaN only where all are
#pragma unroll
      for (int k = 0; k < N; ++k) {
        most = fmaxf(most, x[k]);
        any_bad |= !(x[k] <= kLargestLogit);
      }
      if (most > highest) {
        highest = most;
        at = id;
      }
    });
    while (at < vocab && logits[at] != highest) ++at;  // within that vector
    uint32_t key = key_of(highest), id = static_cast<uint32_t>(at), bad = kNoId;
    if (any_bad)
      for_each_logit([&](int i, float x) {
        if (!(x <= kLargestLogit)) bad = min(bad, static_cast<uint32_t>(i));
      });
    own_key = key;
    uint32_t group = key;
    for (int offset = 1; offset < kSampleGroup; offset *= 2)
      group = max(group, __shfl_xor_sync(kAllLanes, group, offset));
    if (threadIdx.x % kSampleGroup == 0) shared.group_key[threadIdx.x / kSampleGroup] = group;
    const auto reduce = [&] {
      const uint32_t most = __reduce_max_sync(kAllLanes, key);
      id = __reduce_min_sync(kAllLanes, key == most ? id : kNoId);
      key = most;
      bad = __reduce_min_sync(kAllLanes, bad);
    };
    reduce();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
      shared.warp_key[warp] = key;
      shared.warp_id[warp] = id;
      shared.warp_bad[warp] = bad;
    }
    __syncthreads();  // every warp's are there
    key = shared.warp_key[lane];
    id = shared.warp_id[lane];
    bad = shared.warp_bad[lane];
    reduce();
    token = static_cast<int32_t>(bad != kNoId ? bad : id);
    max_logit = logit_of(key);
    if (bad != kNoId) return isnan(logits[bad]) ? Picked::not_a_number : Picked::infinite;
    if (key > kKeyOfMinusInfinity) return Picked::token;
    token = 0;
    return Picked::nothing_finite;
  }

  // Steps 2 to 5.
  __device__ int32_t choose() {
    if (top_k <= kSampleShortK || vocab <= kSampleList) {
      uint32_t least = 0;
      if (vocab > kSampleList)
        least = sample_by_groups(top_k, vocab) ? kth_highest_group() : kth_highest_thread();
      collect(least, [&](uint32_t key, float) { return key >= least; });
      if (shared.count <= kSampleList) return draw_from_list();
    }
    return SampleWholeRow<V>{*this}.choose();
  }

  // The top_k-th highest of the groups' highest logits: at least top_k logits reach it. For a top_k
  // of at most half of the groups few more do, and this is quicker than going by threads.
  __device__ uint32_t kth_highest_group() const {
    if (threadIdx.x < kSampleGroups) {
      const uint32_t own = shared.group_key[threadIdx.x];
      int rank = 0;
#pragma unroll 16
      for (int j = 0; j < kSampleGroups; ++j) {
        const uint32_t other = shared.group_key[j];
        rank += other > own || (other == own && j < static_cast<int>(threadIdx.x)) ? 1 : 0;
      }
      if (rank == top_k - 1) shared.bound = own;
    }
    __syncthreads();  // one thread has found its group's
    return shared.bound;
  }

  // A key that top_k threads' highest logits reach, near the highest such: so at least top_k logits
  // reach it, and hardly more unless many of the row's highest fall to one thread.
  __device__ uint32_t kth_highest_thread() const {
    uint32_t reached = 0;
    for (int bit = 31; bit >= 12; --bit) {  // what is below makes few candidates of a difference
      const uint32_t next = reached | (1u << bit);
      if (__syncthreads_count(own_key >= next) >= top_k) reached = next;
    }
    return reached;
  }

  // A thread owns a candidate and compares it with all others.
  __device__ int32_t draw_from_list() {
    const int count = shared.count, i = static_cast<int>(threadIdx.x);
    const uint64_t pair = i < count ? shared.list[i] : 0;
    const float logit = logit_of(key_of_pair(pair));
    bool kept = i < count;
    if (kept) {
      int rank = 0;
#pragma unroll 8
      for (int j = 0; j < count; ++j) rank += shared.list[j] > pair ? 1 : 0;
      kept = rank < top_k;
    }
    if (top_p < 1) {
      if (i < count) shared.weight[i] = kept ? weight_of(logit, kLog2E64) : 0;
      __syncthreads();  // the weights at temperature 1 are there
      if (kept) {
        uint64_t total = 0, before = 0;
#pragma unroll 8
        for (int j = 0; j < count; ++j) {
          total += shared.weight[j];
          if (shared.list[j] > pair) before += shared.weight[j];
        }
        kept = before == 0 || before < sampling_share(top_p, total);  // 0: before the most likely
      }
      __syncthreads();  // and read
    }
    kept = kept && logit >= least_by_min_p();
    const uint64_t weight = kept ? weight_of(logit, shared.log2_per_logit) : 0;
    if (i < count) shared.weight[i] = weight;
    __syncthreads();  // the weights to draw by are there
    if (kept) {
      uint64_t total = 0, before = 0;
      const uint32_t id = id_of_pair(pair);
#pragma unroll 8
      for (int j = 0; j < count; ++j) {
        total += shared.weight[j];
        if (id_of_pair(shared.list[j]) < id) before += shared.weight[j];
      }
      const uint64_t point = sampling_point(shared.random53, total);
      if (before <= point && point < before + weight) shared.token = static_cast<int32_t>(id);
    }
    __syncthreads();  // one thread has found its token drawn
    return shared.token;
  }
};

}  // namespace krait::cuda
