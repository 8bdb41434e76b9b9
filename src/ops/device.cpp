#include "ops/device.h"

#include <fstream>

#include "core/error.h"
#include "core/threads.h"
#include "hwy/highway.h"
#include "ops/cuda_engine.h"

namespace krait {

const Engine& engine_of_device(const std::string& device) {
  if (device == "cuda") return cuda_engine();
  if (device != "cpu") throw Error("unknown device", "device", "cpu or cuda", device);
  return cpu_engine();
}

namespace {

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos)
      return line.substr(colon + 2);
  }
  return "unknown";  // not every architecture has the line
}

}  // namespace

CpuInfo cpu_info() {
  return {.name = cpu_name(),
          .cores = available_cores(),
          .simd = hwy::TargetName(hwy::SupportedAndGeneratedTargets().front())};
}

}  // namespace krait
