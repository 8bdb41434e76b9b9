// The step of the scan with dt_proj of one block a multiprocessor: the kernel.
#include "ops/cuda/dependent_launch.cuh"
#include "ops/selective_scan_step_ahead.cuh"
#include "ops/selective_scan_step_projected.h"

namespace krait::cuda {
namespace {

using namespace scan_step;

constexpr int kMaxThreads = kAheadMaxChannels / kAheadTile * kWarp + kWarp;

// Grid: all blocks run at once; a group of blocks has its own sequences, a block of it its own
// channels (selective_scan_step_ahead_plan.h). On chip: the block's states of as many sequences as
// there is room for, asked for by a warp of its own; rows of dt_proj and z in registers; dt, delta,
// B, C, u of a round of sequences. Moves 2 x 4 bytes (states in bf16: 2 x 2) for each (sequence,
// channel, state). Barriers: slots are there; of each round x_dbl is there, and no longer needed;
// of each place of the ring, states are there, and have been read. Numerics: as
// selective_scan_step_projected, the same bits.
template <class S>
__global__ void __launch_bounds__(kMaxThreads, 1)
    selective_scan_step_ahead(const __grid_constant__ ScanStepAheadPlan cut,
                              const __grid_constant__ Args args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char memory[];
  Ahead<S>(cut, args, memory, static_cast<int>(blockIdx.x)).run();
#endif
}

}  // namespace

void launch_selective_scan_step_ahead(const State& gpu, const ScanStepAheadPlan& plan,
                                      const SelectiveScan& op) {
  dispatch_f32_bf16(op.state.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const auto shared_bytes = static_cast<size_t>(plan.shared_bytes);
    allow(selective_scan_step_ahead<S>, shared_bytes, 1);
    launch_dependent(gpu, "selective_scan_step_ahead", selective_scan_step_ahead<S>,
                     {.grid = dim3(static_cast<unsigned>(plan.groups * plan.members)),
                      .block = static_cast<unsigned>(plan.threads + kWarp),
                      .shared_bytes = shared_bytes},
                     plan, arguments(op));
  });
}

}  // namespace krait::cuda
