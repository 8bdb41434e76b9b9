// Engines by the names that flags and settings use.
#pragma once

#include <string>

#include "ops/engine.h"

namespace krait {

// "cpu" or "cuda". Throws Error: another name, or as cuda_engine() does.
const Engine& engine_of_device(const std::string& device);

}  // namespace krait
