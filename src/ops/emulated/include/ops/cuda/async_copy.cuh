// In place of the header of this name.
#pragma once

#include <cstring>

#include "cuda_words.h"
#include "ops/cuda/vector.cuh"

namespace krait::cuda {

inline uint32_t shared_address(const void* p) { return emulated::address_of(p); }
template <int kBytes>
void copy_async(uint32_t to, const void* from) {
  std::memcpy(emulated::pointer_to(to, kBytes), from, kBytes);
}
inline void prefetch_to_l2(const void*) {}
inline void copy_async_uncached(uint32_t to, const void* from) {
  std::memcpy(emulated::pointer_to(to, 16), from, 16);
}
inline void end_copies() {}
template <int kGroups>
void wait_for_copies() {}
template <class T, int V>
Packed<T, V> load_copied(uint32_t from) {
  Packed<T, V> out;
  std::memcpy(out.word, emulated::pointer_to(from, Packed<T, V>::kBytes), Packed<T, V>::kBytes);
  return out;
}

}  // namespace krait::cuda
