// Barriers in shared memory at which some threads, or bulk copies, arrive and others wait: a phase
// ends when as many have arrived as the barrier counts, and all bytes that were announced.
#pragma once

#include <cstdint>

namespace krait::cuda {

__device__ __forceinline__ void init_mbarrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
               : "memory");
}

// The block's first kThreads threads meet, whole warps.
template <int kThreads>
__device__ __forceinline__ void meet_first() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}
__device__ __forceinline__ void meet_first(int threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
// Arrives, and announces bytes of bulk copies.
__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Barriers that were initialised are so for copies, and for the whole cluster once it has met.
__device__ __forceinline__ void publish_mbarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The cluster meets: every thread of every block arrives, then waits for all. Without the order
// between the blocks' memory that cooperative groups' sync has, for which an arriving thread first
// waits for its own stores.
__device__ __forceinline__ void arrive_in_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// True in one lane of a warp, all of whose lanes call it.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected));
  return elected != 0;
}
#endif

// Until phase number `phase` (from 0 on) has ended. Only its parity is looked at: the caller knows
// that the phase before has ended, and that the next one cannot end before it arrives.
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t phase) {
  uint32_t done = 0;
  while (done == 0)
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(phase & 1)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(phase & 1)
        : "memory");
#endif
}

}  // namespace krait::cuda
