// Finding one's work in a batch of packed sequences, whose starts only the device knows.
#pragma once

#include <cstdint>

namespace krait::cuda {

// The last i in [0, count) with key(i) <= value; key does not decrease and key(0) <= value.
template <class F>
__device__ __forceinline__ int last_not_above(int count, int64_t value, F key) {
  int low = 0, high = count;  // key(low) <= value < key(high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (key(middle) <= value)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The sequence that token t belongs to. Empty sequences own no token.
__device__ __forceinline__ int sequence_of(const int32_t* seq_start, int num_seqs, int64_t t) {
  return last_not_above(num_seqs, t, [=](int i) { return int64_t{seq_start[i]}; });
}

// The same, looking first where t would be if all sequences were of one length: one step instead of
// log2(num_seqs), each of which waits for memory.
__device__ __forceinline__ int sequence_near(const int32_t* seq_start, int num_seqs, int64_t t,
                                             int64_t tokens) {
  const int guess = static_cast<int>(t * num_seqs / tokens);
  if (seq_start[guess] <= t && t < seq_start[guess + 1]) return guess;
  return sequence_of(seq_start, num_seqs, t);
}

}  // namespace krait::cuda
