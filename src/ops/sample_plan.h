// How sampling on a GPU is laid out: pure arithmetic, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace krait::cuda {

// A block owns a row.
inline constexpr int kSampleThreads = 1024;
// Candidates that are compared each with each. top-k up to kSampleShortK hardly ever leaves more.
inline constexpr int kSampleList = 512;
inline constexpr int kSampleShortK = 256;
// Threads whose highest logits are one group's.
inline constexpr int kSampleGroup = 8;
inline constexpr int kSampleGroups = kSampleThreads / kSampleGroup;
// Bins of logits, by their distance from the highest: 64 to a unit, the last one takes the rest.
inline constexpr int kSampleBins = 2 * kSampleThreads;
inline constexpr float kSampleBinsPerUnit = 64;

// Whether a bound on the top_k-th highest logit comes from groups: where every thread has logits,
// and with so few of top_k that two of them are seldom in one group.
constexpr bool sample_by_groups(int top_k, int64_t vocab_size) {
  return top_k <= kSampleGroups / 2 && vocab_size >= 4 * kSampleThreads;
}

// Of the bins, and before them of a bit for each token of the vocabulary.
inline int64_t sample_shared_bytes(int64_t vocab_size) {
  return std::max<int64_t>(kSampleBins * 8, (vocab_size + 31) / 32 * 4);
}

}  // namespace krait::cuda
