// What this GPU can do at best: the floors that benchmarks print beside their times.
#include <algorithm>

#include "ops/cuda/math.cuh"
#include "ops/cuda/state.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256, kBlocksPerMultiprocessor = 8, kIndependent = 8, kRounds = 512;

// kIndependent chains of exps per thread, in registers.
__global__ void exp_rate_kernel(float* out, float start) {
  float x[kIndependent];
  for (int i = 0; i < kIndependent; ++i) x[i] = start - 0.01f * i - 0.001f * threadIdx.x;
  for (int round = 0; round < kRounds; ++round)
    for (int i = 0; i < kIndependent; ++i) x[i] = exp2_approx(x[i]) - 1.0f;
  float sum = 0;
  for (int i = 0; i < kIndependent; ++i) sum += x[i];
  if (sum == 1.2345f) *out = sum;  // never: keeps the work
}

// Seconds of the fastest of several runs.
template <class F>
double best_seconds(cudaStream_t stream, F&& run) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "timing");
  check(cudaEventCreate(&end), "timing");
  float best = 1e30f;
  for (int i = 0; i < 8; ++i) {
    check(cudaEventRecord(begin, stream), "timing");
    run();
    check(cudaEventRecord(end, stream), "timing");
    check(cudaEventSynchronize(end), "timing");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "timing");
    best = std::min(best, ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return best * 1e-3;
}

}  // namespace

double read_bandwidth(Context& ctx) {
  constexpr size_t kBytes = size_t{1} << 30;
  const Buffer from(kBytes, device_memory()), to(kBytes, device_memory());
  const cudaStream_t stream = state_of(ctx).stream;
  const double seconds = best_seconds(stream, [&] {
    check(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, stream),
          "copying memory");
  });
  return 2.0 * kBytes / seconds;
}

double exp_rate(Context& ctx) {
  State& state = state_of(ctx);
  const Buffer out(sizeof(float), device_memory());
  const int blocks = kBlocksPerMultiprocessor * state.multiprocessors;
  const double seconds = best_seconds(state.stream, [&] {
    exp_rate_kernel<<<blocks, kThreads, 0, state.stream>>>(static_cast<float*>(out.data()), -0.5f);
    check_launch("exp_rate_kernel");
  });
  return static_cast<double>(blocks) * kThreads * kIndependent * kRounds / seconds;
}

}  // namespace krait::cuda
