#include "ops/cuda/module.h"

#include <cuda_runtime.h>

#include "ops/cuda/state.h"
#include "ops/engine_table.h"
#include "ops/selective_scan_plan.h"

namespace krait::cuda {
namespace {

constexpr int kOldestMajor = 8;  // compute capability

int gpu_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice) return 0;
  if (error == cudaErrorInsufficientDriver)
    throw Error("no NVIDIA driver, or one that is older than this build's CUDA", "GPU");
  check(error, "looking for GPUs");
  return count;
}

GpuInfo info_of(int index) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, index), "reading the GPU's properties");
  GpuInfo info{.index = index,
               .name = properties.name,
               .major = properties.major,
               .minor = properties.minor,
               .multiprocessors = properties.multiProcessorCount,
               .total_bytes = static_cast<int64_t>(properties.totalGlobalMem),
               .free_bytes = 0,
               .problem = {}};
  if (info.major < kOldestMajor) {
    info.problem = "too old: compute capability " + std::to_string(info.major) + "." +
                   std::to_string(info.minor) + ", needs 8.0";
    return info;
  }
  size_t free = 0, total = 0;
  if (const cudaError_t error = cudaSetDevice(index); error != cudaSuccess) {
    info.problem = cudaGetErrorString(error);
  } else if (cudaMemGetInfo(&free, &total) == cudaSuccess) {
    info.free_bytes = static_cast<int64_t>(free);
  }
  cudaGetLastError();
  return info;
}

std::vector<GpuInfo> list_gpus() {
  std::vector<GpuInfo> gpus;
  const int count = gpu_count();
  for (int i = 0; i < count; ++i) gpus.push_back(info_of(i));
  if (count > 0) cudaSetDevice(0);
  return gpus;
}

const Engine& engine() {
  static const Engine table = [] {
    if (gpu_count() == 0) throw Error("no GPU", "device cuda", "an NVIDIA GPU", "none");
    const GpuInfo gpu = info_of(0);
    if (!gpu.problem.empty()) throw Error("cannot use the GPU", gpu.name, "", gpu.problem);
    return Engine KRAIT_ENGINE_TABLE(
        cuda, .memory = device_memory, .transfer_memory = pinned_memory, .scan_chunk = kScanChunk,
        .synchronize = synchronize, .mark = mark, .wait = wait, .follow = follow, .record = record,
        .replay = replay, .read_bandwidth = read_bandwidth, .exp_rate = exp_rate,
        .scan_stage = scan_stage, .scan_step_projects = scan_step_projects,
        .takes_decoder_step = takes_decoder_step, .decoder_step = decoder_step);
  }();
  return table;
}

}  // namespace
}  // namespace krait::cuda

extern "C" const krait::cuda::Module* krait_cuda_module() {
  using namespace krait::cuda;
  static const Module module = {kModuleVersion, list_gpus, engine};
  return &module;
}
