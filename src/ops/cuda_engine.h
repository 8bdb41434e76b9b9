// The CUDA engine: a module beside the library (libkrait_cuda.so), loaded when it is first asked
// for, so that one build runs with and without a GPU, its driver and CUDA's libraries.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/engine.h"

namespace krait {

struct GpuInfo {
  int index = 0;
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int64_t total_bytes = 0, free_bytes = 0;
  std::string problem;  // why the engine cannot use it; empty: it can
};

// Every GPU of this machine. Throws Error: built without CUDA, CUDA's libraries or the driver are
// missing.
std::vector<GpuInfo> list_gpus();

// Computes on GPU 0 (CUDA_VISIBLE_DEVICES chooses which that is). Throws Error as list_gpus does,
// and where there is no GPU, or one older than compute capability 8.0.
const Engine& cuda_engine();

}  // namespace krait
