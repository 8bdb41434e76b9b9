// What the module exports to the library.
#pragma once

#include <vector>

#include "ops/cuda_engine.h"

namespace krait::cuda {

// Changes with every change of Engine or of a contract: a module of another build is refused.
inline constexpr int kModuleVersion = 2;

struct Module {
  int version;
  std::vector<GpuInfo> (*list_gpus)();
  const Engine& (*engine)();
};

}  // namespace krait::cuda

// The module's only symbol that is looked up by name: krait_cuda_module.
extern "C" const krait::cuda::Module* krait_cuda_module();
