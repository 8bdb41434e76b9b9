// Steps 2 to 5 of sampling from a row by passes over all of it: for options that leave many
// candidates, or rows with many equal logits.
#pragma once

#include "ops/sample_logits.cuh"

namespace krait::cuda {

// Sum over the block, for every thread. Ends behind a barrier.
__device__ inline uint64_t block_sum(uint64_t x, uint64_t* warp_sum) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = x;
  __syncthreads();  // every warp's sum is there
  x = 0;
  for (int w = 0; w < kSampleWarps; ++w) x += warp_sum[w];
  __syncthreads();  // and read
  return x;
}

__device__ inline uint64_t warp_inclusive_sum(uint64_t x) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, x, offset);
    if (threadIdx.x % 32 >= static_cast<unsigned>(offset)) x += below;
  }
  return x;
}

template <int V>
struct SampleWholeRow : SampleLogits<V> {
  using SampleLogits<V>::bins, SampleLogits<V>::logits, SampleLogits<V>::max_logit;
  using SampleLogits<V>::shared, SampleLogits<V>::top_k, SampleLogits<V>::top_p;
  using SampleLogits<V>::vocab;
  using SampleLogits<V>::collect, SampleLogits<V>::for_each_logit;
  using SampleLogits<V>::least_by_min_p, SampleLogits<V>::weight_of;

  __device__ int32_t choose() {
    if (threadIdx.x == 0) {
      shared.kept_key = kKeyOfMinusInfinity;
      shared.kept_ties = 0;
    }
    __syncthreads();  // everything finite is kept
    if (top_k < vocab) select</*kByWeight=*/false>();
    if (top_p < 1) select</*kByWeight=*/true>();
    return draw();
  }

  template <bool kByWeight>
  __device__ uint64_t measure(float logit) const {
    return kByWeight ? weight_of(logit, kLog2E64) : 1;
  }
  __device__ int bin_of(float logit) const {
    return min(kSampleBins - 1, __float2int_rz((max_logit - logit) * kSampleBinsPerUnit));
  }

  // In two halves: an atomic of 64 bits on chip is a loop.
  __device__ void add_to_bin(int bin, uint64_t amount) {
    auto* const halves = reinterpret_cast<uint32_t*>(&bins[bin]);  // the lower one first
    const auto low = static_cast<uint32_t>(amount);
    const uint32_t before = atomicAdd(halves, low);
    const auto high = static_cast<uint32_t>(amount >> 32) + (before + low < before ? 1 : 0);
    if (high > 0) atomicAdd(halves + 1, high);
  }

  // Narrows what is kept to the most likely tokens whose measures sum to the target: top_k in
  // number, or the share top_p of the weight. First the bin where the sum gets there, then the
  // token in that bin.
  template <bool kByWeight>
  __device__ void select() {
    const uint32_t kept_key = shared.kept_key, kept_ties = shared.kept_ties;
    const uint64_t target = find_bin<kByWeight>(kept_key, kept_ties);
    const int bin = shared.bin;
    const uint64_t before_bin = shared.before;
    collect(0, [&](uint32_t key, float x) {
      return (key > kept_key || (key == kept_key && kept_ties > 0)) && bin_of(x) == bin;
    });
    const int count = shared.count, i = static_cast<int>(threadIdx.x);
    if (count > kSampleList) return select_in_bin<kByWeight>(target);
    const uint64_t pair = i < count ? shared.list[i] : 0;
    const uint64_t own = i < count ? measure<kByWeight>(logit_of(key_of_pair(pair))) : 0;
    if (i < count) shared.weight[i] = own;
    __syncthreads();  // the measures are there
    if (i < count) {
      uint64_t before = before_bin;
      uint32_t ties = 1;
      for (int j = 0; j < count; ++j) {
        if (shared.list[j] <= pair) continue;
        before += shared.weight[j];
        ties += key_of_pair(shared.list[j]) == key_of_pair(pair) ? 1 : 0;
      }
      if (before < target && target <= before + own) {
        shared.kept_key = key_of_pair(pair);
        shared.kept_ties = ties;
      }
    }
    __syncthreads();  // the last token that is kept is known
  }

  // Gives the target; shared.bin is where the sum reaches it, shared.before the sum of the bins
  // before that one.
  template <bool kByWeight>
  __device__ uint64_t find_bin(uint32_t kept_key, uint32_t kept_ties) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    bins[2 * thread] = bins[2 * thread + 1] = 0;
    __syncthreads();  // the bins are empty
    const auto add = [&](float x, uint64_t times) {
      const uint64_t amount = times * measure<kByWeight>(x);
      if (amount > 0) add_to_bin(bin_of(x), amount);
    };
    for_each_logit([&](int, float x) {
      if (key_of(x) > kept_key) add(x, 1);
    });
    if (thread == 0 && kept_ties > 0) add(logit_of(kept_key), kept_ties);
    __syncthreads();  // the bins are full
    const uint64_t first = bins[2 * thread], both = first + bins[2 * thread + 1];
    uint64_t sum = warp_inclusive_sum(both);
    if (lane == 31) shared.warp_sum[warp] = sum;
    __syncthreads();  // every warp's sum is there
    uint64_t total = 0, below = 0;
    for (int w = 0; w < kSampleWarps; ++w) {
      if (w == warp) below = total;
      total += shared.warp_sum[w];
    }
    sum += below;
    const uint64_t target =
        kByWeight ? max(uint64_t{1}, sampling_share(top_p, total)) : static_cast<uint64_t>(top_k);
    if (sum - both < target && target <= sum) {
      const bool in_first = sum - both + first >= target;
      shared.bin = 2 * thread + (in_first ? 0 : 1);
      shared.before = sum - both + (in_first ? 0 : first);
    }
    if (!kByWeight && thread == 0 && total < target) {  // fewer are finite: the last of all
      shared.bin = -1;
    }
    __syncthreads();  // the bin is known
    return target;
  }

  // The same for a bin with more tokens than the list holds (many equal ones, or far from the
  // highest): bit by bit, the highest key at or above which the sum is enough.
  template <bool kByWeight>
  __device__ void select_in_bin(uint64_t target) {
    const uint32_t kept_key = shared.kept_key, kept_ties = shared.kept_ties;
    const int bin = shared.bin;
    const uint64_t before = shared.before;
    const auto sum_from = [&](uint32_t least) {
      uint64_t sum = 0;
      for_each_logit([&](int, float x) {
        const uint32_t key = key_of(x);
        if (key > kept_key && key >= least && bin_of(x) == bin) sum += measure<kByWeight>(x);
      });
      const float kept_logit = logit_of(kept_key);
      if (threadIdx.x == 0 && kept_ties > 0 && kept_key >= least && bin_of(kept_logit) == bin)
        sum += kept_ties * measure<kByWeight>(kept_logit);
      return before + block_sum(sum, shared.warp_sum);
    };
    uint32_t key = 0;
    for (int bit = 31; bit >= 0; --bit)
      if (sum_from(key | (1u << bit)) >= target) key |= 1u << bit;
    const uint64_t above = sum_from(key + 1), each = measure<kByWeight>(logit_of(key));
    if (threadIdx.x == 0) {
      shared.kept_key = key;
      shared.kept_ties = static_cast<uint32_t>((target - above + each - 1) / each);
    }
    __syncthreads();  // the last token that is kept is known
  }

  // A warp owns a stretch of the row, in pieces: their weights tell in which the drawn token is,
  // and the warp that owns it goes through that piece again.
  __device__ int32_t draw() {
    constexpr int kPieces = 8;
    static_assert(kPieces * kSampleWarps <= kSampleList);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    constexpr int kStep = 32 * kPieces * kSampleWarps;
    const int length = (vocab + kStep - 1) / kStep * 32;
    const Drawn drawn = what_is_drawn();
    uint64_t sum = 0;
    uint32_t ties = 0;
    for (int p = 0; p < kPieces; ++p) {
      const int begin = (warp * kPieces + p) * length;
      const Mass mass = mass_of(begin, min(vocab, begin + length), drawn);
      if (lane == 0) {
        shared.weight[warp * kPieces + p] = mass.weight;
        shared.list[warp * kPieces + p] = mass.ties;
      }
      sum += mass.weight;
      ties += mass.ties;
    }
    if (lane == 0) {
      shared.warp_sum[warp] = sum;
      shared.warp_ties[warp] = ties;
    }
    __syncthreads();  // every stretch's and piece's are there
    uint64_t total = 0, before = 0, own = 0;
    uint32_t ties_left = drawn.ties, own_ties = 0;
    for (int w = 0; w < kSampleWarps; ++w) {
      const uint32_t here = min(ties_left, shared.warp_ties[w]);
      const uint64_t weight = shared.warp_sum[w] + here * drawn.tie_weight;
      if (w == warp) {
        before = total;
        own = weight;
        own_ties = here;
      }
      ties_left -= here;
      total += weight;
    }
    const uint64_t point = sampling_point(shared.random53, total);
    if (before <= point && point < before + own) {
      int piece = warp * kPieces;
      for (;; ++piece) {
        const uint32_t here = min(own_ties, static_cast<uint32_t>(shared.list[piece]));
        const uint64_t weight = shared.weight[piece] + here * drawn.tie_weight;
        if (point < before + weight) break;
        before += weight;
        own_ties -= here;
      }
      draw_from_piece(piece * length, min(vocab, (piece + 1) * length), before, own_ties, point,
                      drawn);
    }
    __syncthreads();  // one warp has found the token drawn
    return shared.token;
  }

  // Tokens of a higher logit than `key`'s and at least min_p, and of that key the first `ties`.
  struct Drawn {
    uint32_t key, ties;
    uint64_t tie_weight;
    double log2_per_logit;
  };
  __device__ Drawn what_is_drawn() const {
    const double log2_per_logit = shared.log2_per_logit;
    const float tie = logit_of(shared.kept_key);
    const bool weighs = shared.kept_ties > 0 && tie >= least_by_min_p();
    return {shared.kept_key, shared.kept_ties, weighs ? weight_of(tie, log2_per_logit) : 0,
            log2_per_logit};
  }
  __device__ uint64_t weight_above(float logit, float least, const Drawn& drawn) const {
    return key_of(logit) > drawn.key && logit >= least ? weight_of(logit, drawn.log2_per_logit) : 0;
  }

  // Of a piece of the row, for every lane of the warp: the weight of what is above the key, and how
  // many are of the key.
  struct Mass {
    uint64_t weight;
    uint32_t ties;
  };
  __device__ Mass mass_of(int begin, int end, const Drawn& drawn) const {
    const float least = least_by_min_p();
    uint64_t weight = 0;
    uint32_t ties = 0;
#pragma unroll 4
    for (int i = begin + static_cast<int>(threadIdx.x % 32); i < end; i += 32) {
      const float x = logits[i];
      weight += weight_above(x, least, drawn);
      ties += key_of(x) == drawn.key ? 1 : 0;
    }
    for (int offset = 16; offset > 0; offset /= 2)
      weight += __shfl_xor_sync(kAllLanes, weight, offset);
    return {weight, __reduce_add_sync(kAllLanes, ties)};
  }

  // The token at `point` becomes shared.token; before: the weight of all before the piece; ties:
  // how many of the piece's are drawn from.
  __device__ void draw_from_piece(int begin, int end, uint64_t before, uint32_t ties,
                                  uint64_t point, const Drawn& drawn) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float least = least_by_min_p();
    for (int first = begin; first < end; first += 32) {
      const float x = first + lane < end ? logits[first + lane] : logit_of(kKeyOfMinusInfinity);
      const bool tie = key_of(x) == drawn.key;
      const unsigned all_ties = __ballot_sync(kAllLanes, tie);
      const bool counts = static_cast<uint32_t>(__popc(all_ties & ((1u << lane) - 1))) < ties;
      const uint64_t tie_weight = counts ? drawn.tie_weight : 0;
      const uint64_t weight = tie ? tie_weight : weight_above(x, least, drawn);
      const uint64_t reached = before + warp_inclusive_sum(weight);
      const unsigned beyond = __ballot_sync(kAllLanes, reached > point);
      if (beyond != 0) {
        if (lane == 0) shared.token = first + __ffs(static_cast<int>(beyond)) - 1;
        return;
      }
      before = __shfl_sync(kAllLanes, reached, 31);
      ties -= min(ties, static_cast<uint32_t>(__popc(all_ties)));
    }
  }
};

}  // namespace krait::cuda
