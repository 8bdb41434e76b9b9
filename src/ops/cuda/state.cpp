#include "ops/cuda/state.h"

#include <cstdio>
#include <cstring>
#include <string>

#include "core/error.h"

namespace krait::cuda {
namespace {

std::string gib(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (1 << 30));
  return text;
}

class DeviceMemory final : public Memory {
 public:
  bool on_host() const override { return false; }
  void zero(void* to, size_t bytes) override {
    if (bytes == 0) return;
    check(cudaMemset(to, 0, bytes), "clearing memory");
    check(cudaStreamSynchronize(cudaStreamLegacy), "clearing memory");
  }
  void upload(void* to, const void* host, size_t bytes) override { move(to, host, bytes); }
  void download(void* host, const void* from, size_t bytes) override { move(host, from, bytes); }
  void copy(void* to, const void* from, size_t bytes) override {
    move(to, from, bytes);
    check(cudaStreamSynchronize(cudaStreamLegacy), "copying memory");
  }

 private:
  static void move(void* to, const void* from, size_t bytes) {
    if (bytes > 0) check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "copying memory");
  }
  void* do_allocate(size_t bytes, size_t) override {
    void* p = nullptr;
    const cudaError_t error = cudaMalloc(&p, bytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      throw Error("the GPU's memory is full", "device memory", gib(bytes) + " more",
                  gib(free) + " free of " + gib(total));
    }
    check(error, "allocating memory");
    return p;
  }
  void do_deallocate(void* p, size_t, size_t) override { cudaFree(p); }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

class PinnedMemory final : public HostMemory {
  void* do_allocate(size_t bytes, size_t) override {
    void* p = nullptr;
    check(cudaHostAlloc(&p, bytes, cudaHostAllocDefault), "allocating page-locked memory");
    return p;
  }
  void do_deallocate(void* p, size_t, size_t) override { cudaFreeHost(p); }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

}  // namespace

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky is forgotten
  throw Error(std::string("CUDA failed: ") + cudaGetErrorString(error), doing);
}

Memory& device_memory() {
  static DeviceMemory memory;
  return memory;
}

Memory& pinned_memory() {
  static PinnedMemory memory;
  return memory;
}

State::State() {
  int device = 0, shared = 0;
  check(cudaGetDevice(&device), "choosing the GPU");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "reading the GPU's properties");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "reading the GPU's properties");
  check(cudaDeviceGetAttribute(&compute_major, cudaDevAttrComputeCapabilityMajor, device),
        "reading the GPU's properties");
  check(cudaDeviceGetAttribute(&compute_minor, cudaDevAttrComputeCapabilityMinor, device),
        "reading the GPU's properties");
  shared_bytes_per_block = static_cast<size_t>(shared);
  int together = 0;
  check(cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device),
        "reading the GPU's properties");
  cooperative = together != 0;
  check(cudaStreamCreate(&stream), "creating a stream");
}

State::~State() { cudaStreamDestroy(stream); }

void* State::lasting_memory(size_t bytes) {
  const auto found = lasting_.find(bytes);
  if (found != lasting_.end()) return found->second.data();
  Buffer buffer(bytes, device_memory());
  device_memory().zero(buffer.data(), bytes);
  return lasting_.emplace(bytes, std::move(buffer)).first->second.data();
}

}  // namespace krait::cuda
