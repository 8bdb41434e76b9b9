// The words of CUDA C++ that kernels' headers use, for the host's compiler. In front of them.
#pragma once

#include <cuda_bf16.h>
#include <vector_functions.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "ops/emulated/emulator.h"

#undef __device__
#undef __forceinline__
#define __device__
#define __forceinline__ inline
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL 1

using std::max;
using std::min;

inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, const T& x) {
  *p = x;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline void __syncthreads() { krait::emulated::meet_all(); }
inline void __syncwarp() { krait::emulated::meet_in_warp(); }
template <class T>
T __shfl_sync(uint32_t, T x, int lane) {
  return std::bit_cast<T>(krait::emulated::from_lane(std::bit_cast<uint32_t>(x), lane));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int distance) {
  return __shfl_sync(mask, x, static_cast<int>(threadIdx.x % 32) ^ distance);
}
