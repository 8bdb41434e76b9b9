// What the CUDA engine keeps in a Context: its stream, the GPU's size, cuBLASLt. Included by .cu
// and .cpp files of the module only.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <memory>

#include "ops/engine.h"

namespace krait::cuda {

// Throws Error when a call of CUDA's failed; `doing` completes "CUDA failed while ..".
void check(cudaError_t error, const char* doing);
// After a kernel launch.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

struct State {
  State();
  ~State();
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  // Ordered with the default stream, and so with Memory's transfers.
  cudaStream_t stream = nullptr;
  int multiprocessors = 0;
  int compute_major = 0, compute_minor = 0;  // the compute capability
  size_t shared_bytes_per_block = 0;         // after opting in
  bool cooperative = false;  // kernels whose blocks are all resident can be launched
  struct Blas;               // gemm.cpp
  std::shared_ptr<Blas> blas;

  // Memory of so many bytes for what lasts from launch to launch, zero at first; always the same
  // for the same size, since recordings hold its address: whoever asks for as many shares it.
  void* lasting_memory(size_t bytes);

 private:
  std::map<size_t, Buffer> lasting_;
};

inline State& state_of(Context& ctx) { return ctx.engine_state<State>(); }

Memory& device_memory();
Memory& pinned_memory();

}  // namespace krait::cuda
