// Exchange between the blocks of one kernel that are all resident: 32 bits of data travel with the
// number of the round that they belong to in one aligned 8-byte word, which a reader polls. One
// trip through the L2 cache instead of the three of data, fence and barrier. A word may be written
// again once every reader of its last round is known to have read it.
#pragma once

#include <cstdint>

namespace krait::cuda {

using FlaggedWord = uint2;  // x: data, y: round

__device__ __forceinline__ void publish(FlaggedWord* to, uint32_t data, uint32_t round) {
  const uint64_t word = static_cast<uint64_t>(round) << 32 | data;
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(word)
               : "memory");
}

// Two neighbouring words, 16-byte aligned: {data, round, data, round}. Each half is read whole.
__device__ __forceinline__ uint4 peek2(const FlaggedWord* from) {
  uint64_t a, b;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(a), "=l"(b)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return make_uint4(static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32),
                    static_cast<uint32_t>(b), static_cast<uint32_t>(b >> 32));
}

// Waits for pairs of words: pair i of kPairs lies at from + i * stride, those below `count` are
// wanted, the others become 0. All of them are asked for together.
template <int kPairs>
__device__ __forceinline__ void await_pairs(uint4 (&w)[kPairs], const FlaggedWord* from, int stride,
                                            int count, uint32_t round) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    w[i] = make_uint4(0, 0, 0, 0);
    if (i < count) w[i] = peek2(from + i * stride);
  }
  bool complete;
  do {
    complete = true;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (i < count && (w[i].y != round || w[i].w != round)) {
        w[i] = peek2(from + i * stride);
        complete = false;
      }
  } while (!complete);
}

}  // namespace krait::cuda
