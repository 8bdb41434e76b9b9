// Engines by the names that flags and settings use, and what this machine has for them.
#pragma once

#include <string>

#include "ops/engine.h"

namespace krait {

// "cpu" or "cuda". Throws Error: another name, or as cuda_engine() does.
const Engine& engine_of_device(const std::string& device);

struct CpuInfo {
  std::string name;
  int cores = 0;     // that this process may run on
  std::string simd;  // instruction set that the CPU engine takes, as Highway names it
};

CpuInfo cpu_info();

}  // namespace krait
