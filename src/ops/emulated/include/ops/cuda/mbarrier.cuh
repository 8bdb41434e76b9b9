// In place of the header of this name.
#pragma once

#include "cuda_words.h"

namespace krait::cuda {

inline void init_mbarrier(uint32_t barrier, int count) { emulated::init_barrier(barrier, count); }
inline void arrive(uint32_t barrier) { emulated::arrive_at(barrier, 0); }
inline void arrive_and_expect(uint32_t barrier, int bytes) { emulated::arrive_at(barrier, bytes); }
inline void wait_for_phase(uint32_t barrier, uint32_t phase) {
  emulated::await_phase(barrier, phase);
}
inline void publish_mbarriers() {}
template <int kThreads>
void meet_first() {
  emulated::meet_in_block(1, kThreads);
}
inline void meet_first(int threads) { emulated::meet_in_block(1, threads); }
inline void arrive_in_cluster() { emulated::arrive_at_cluster(); }
inline void wait_for_cluster() { emulated::await_cluster(); }
inline bool elect_one() { return threadIdx.x % 32 == 0; }

}  // namespace krait::cuda
