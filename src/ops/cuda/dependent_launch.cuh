// Kernels that start while the one before them ends (programmatic dependent launch, from compute
// capability 9.0 on): the launch itself, and what a kernel may do before it needs the other's
// results, take no time of their own.
#pragma once

#include <utility>

#include "ops/cuda/state.h"

namespace krait::cuda {

// Until all work queued before this kernel is done and visible. What a kernel does before this may
// read what the work queued right before it does not write, and write nothing.
__device__ __forceinline__ void wait_for_earlier_work() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start, as far as there is room for it. Behind wait_for_earlier_work, so that
// whatever starts before this kernel ends can count on all work before this kernel.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x that share their shared memory; from 9.0 on
};

// Before launches of up to so much shared memory, by clusters of so many blocks.
template <class Kernel>
void allow(Kernel kernel, size_t shared_bytes, unsigned cluster) {
  constexpr unsigned kPortable = 8;  // blocks of a cluster
  if (cluster > kPortable)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "asking for large clusters");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "asking for shared memory");
}

// How many clusters of such blocks run at once; 0 where a cluster of this size does not fit at all.
template <class Kernel>
int clusters_at_once(Kernel kernel, const LaunchShape& shape) {
  allow(kernel, shape.shared_bytes, shape.cluster);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.cluster);
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

// The kernel calls wait_for_earlier_work in every thread that reads or writes what other kernels
// do, and in some of every block, so that it does not end before the work before it.
template <class... Parameters, class... Arguments>
void launch_dependent(const State& gpu, const char* name, void (*kernel)(Parameters...),
                      const LaunchShape& shape, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = gpu.stream;
  config.attrs = attributes;
  config.numAttrs = gpu.compute_major < 9 ? 0 : shape.cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace krait::cuda
