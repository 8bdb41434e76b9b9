// Exchange between the blocks of one kernel that are all resident: 32 bits of data are a word that
// a reader polls until it is there. One trip through the L2 cache instead of the three of data,
// fence and barrier, and nothing but the data to read. A word is 0 until it is published, and again
// from when it is withdrawn on, which is for its writer to do once every reader is known to have
// read it.
#pragma once

#include <cstdint>

namespace krait::cuda {

using ExchangedWord = uint32_t;  // ~data, which must not be all ones: no rounded number is

// An atomic "or" where there was 0: a store in its place arrives some hundred cycles later while
// weights stream through the cache (docs/kernels_cuda.md).
__device__ __forceinline__ void publish(ExchangedWord* to, uint32_t data) {
  asm volatile("red.relaxed.gpu.global.or.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)),
               "r"(~data)
               : "memory");
}
__device__ __forceinline__ void withdraw(ExchangedWord* word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(__cvta_generic_to_global(word))
               : "memory");
}
// 0, once what this thread has withdrawn is gone for all: it is read where all read it.
__device__ __forceinline__ uint32_t peek(const ExchangedWord* from) {
  uint32_t w;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
               : "=r"(w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return w;
}

// Four neighbouring words, 16-byte aligned. Each is read whole.
__device__ __forceinline__ uint4 peek4(const ExchangedWord* from) {
  uint4 w;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return w;
}

// Who looks in vain looks again behind a whole trip, and what all ask for holds up what comes:
// where it is known that words take a while, the first look waits for so many cycles.
__device__ __forceinline__ void rest(int cycles) {
  if (cycles == 0) return;
  const auto begin = static_cast<int>(clock());
  while (static_cast<int>(clock()) - begin < cycles) {
  }
}

// Waits for fours of words, and gives their data: four i of kFours lies at from + i * stride, those
// below `count` are wanted, the others become 0. All of them are asked for together.
template <int kFours>
__device__ __forceinline__ void await_fours(uint4 (&data)[kFours], const ExchangedWord* from,
                                            int stride, int count) {
  uint4 w[kFours];
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    w[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
    if (i < count) w[i] = peek4(from + i * stride);
  }
  bool complete;
  do {
    complete = true;
#pragma unroll
    for (int i = 0; i < kFours; ++i)
      if (w[i].x == 0 || w[i].y == 0 || w[i].z == 0 || w[i].w == 0) {
        w[i] = peek4(from + i * stride);
        complete = false;
      }
  } while (!complete);
#pragma unroll
  for (int i = 0; i < kFours; ++i) data[i] = make_uint4(~w[i].x, ~w[i].y, ~w[i].z, ~w[i].w);
}

}  // namespace krait::cuda
