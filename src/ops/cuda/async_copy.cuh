// Copies from global to shared memory that a thread starts now and waits for later, without
// registers in between. What is copied is read back with load_copied, by the thread that copied it,
// by its warp behind a __syncwarp, or by others behind an mbarrier that hears of the copies: these
// are ordered among themselves, and leave the compiler free to move other accesses.
#pragma once

#include <cstdint>

#include "ops/cuda/vector.cuh"

namespace krait::cuda {

// Address of shared memory as the copies want it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// kBytes: 4, 8 or 16; both sides are multiples of it.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "n"(kBytes));
}

// 16 bytes past the first-level cache: what is read once, or before wait_for_earlier_work, when
// that cache may hold what was there before.
__device__ __forceinline__ void copy_async_uncached(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)));
}

// The line at `from` on its way to the second-level cache.
__device__ __forceinline__ void prefetch_to_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Ends a group of copies.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;"); }

// Until all but the last kGroups groups are there.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups));
}

// A place for a copy, filled with one word instead: ordered with the copies and load_copied.
template <int kBytes>
__device__ __forceinline__ void fill_words(uint32_t to, uint32_t word) {
  if constexpr (kBytes == 16) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(word));
  } else if constexpr (kBytes == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %1};" ::"r"(to), "r"(word));
  } else {
    static_assert(kBytes == 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word));
  }
}

template <class T, int V>
__device__ __forceinline__ Packed<T, V> load_copied(uint32_t from) {
  Packed<T, V> out;
  constexpr int kBytes = Packed<T, V>::kBytes;
  if constexpr (kBytes == 2) {
    uint16_t half;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(from));
    out.word[0] = half;
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(out.word[0]) : "r"(from));
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(out.word[0]), "=r"(out.word[1])
                 : "r"(from));
  } else {
    static_assert(kBytes == 16);
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
                 : "r"(from));
  }
  return out;
}

}  // namespace krait::cuda
