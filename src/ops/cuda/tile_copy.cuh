// Copies that one thread starts and whose bytes arrive at a barrier: of a matrix's tiles
// (tensor_map.h) to shared memory, and between the blocks of a cluster. From compute capability 9.0
// on.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace krait::cuda {

// Of a map that copies will need.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// The tile whose first element is (row, column), to a multiple of 1024 bytes.
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap& map, int row, int column,
                                          uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
#endif
}

// The same of a matrix that is read once: its lines make room in the cache first.
__device__ __forceinline__ void copy_tile_once(uint32_t to, const CUtensorMap& map, int row,
                                               int column, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy; "
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], policy; }" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
#endif
}

// Contiguous bytes of global memory, a multiple of 16 from a multiple of 16 on.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes,
                                          uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// The same of what is read once: its lines make room in the cache first.
__device__ __forceinline__ void copy_bulk_once(uint32_t to, const void* from, int bytes,
                                               uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy; "
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], policy; }" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// What this thread wrote to shared memory, to copies that are started behind the next barrier.
__device__ __forceinline__ void publish_to_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// From this block's shared memory to another block's of the cluster, where the bytes, a multiple of
// 16, arrive at a barrier; `to` and `barrier` are given as they lie in this block.
__device__ __forceinline__ void copy_to_block(int block, uint32_t to, uint32_t from, int bytes,
                                              uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b32 to, barrier; mapa.shared::cluster.u32 to, %0, %4; "
      "mapa.shared::cluster.u32 barrier, %3, %4; "
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [%1], %2, "
      "[barrier]; }" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier), "r"(block)
      : "memory");
#endif
}

// Arrives at a barrier of a block of the cluster, given as it lies in this block.
__device__ __forceinline__ void arrive_at_block(int block, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b32 barrier; mapa.shared::cluster.u32 barrier, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [barrier]; }" ::"r"(barrier),
      "r"(block)
      : "memory");
#endif
}

}  // namespace krait::cuda
