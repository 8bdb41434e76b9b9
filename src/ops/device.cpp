#include "ops/device.h"

#include "core/error.h"
#include "ops/cuda_engine.h"

namespace krait {

const Engine& engine_of_device(const std::string& device) {
  if (device == "cuda") return cuda_engine();
  if (device != "cpu") throw Error("unknown device", "device", "cpu or cuda", device);
  return cpu_engine();
}

}  // namespace krait
