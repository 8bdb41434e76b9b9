// Selective scan on the GPU, one token for each sequence, with dt_proj: the kernel for many
// sequences (selective_scan_step_projected.cuh).
#include "ops/cuda/arguments.h"
#include "ops/cuda/vector_access.h"
#include "ops/engine.h"
#include "ops/selective_scan_step_projected.cuh"
#include "ops/selective_scan_step_projected.h"

namespace krait::cuda {
namespace {

using namespace scan_step;

// Grid: x over blocks of channels, y over groups of sequences.
template <class S, int kSequences, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    selective_scan_step_projected(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) unsigned char memory[];
  run<S, kSequences, kBlocks>(a, memory, static_cast<int>(blockIdx.x),
                              static_cast<int>(blockIdx.y));
}

template <class S, int kSequences, int kBlocks>
void launch(Context& ctx, const ScanStepProjectedPlan& plan, const Args& a) {
  const auto kernel = selective_scan_step_projected<S, kSequences, kBlocks>;
  static_assert(sizeof(Shared<S, kSequences, kBlocks>) < 48 * 1024);
  static const cudaError_t raised = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(scan_step::shared_bytes<S, kSequences, kBlocks>(kProjectedMaxRank)));
  check(raised, "preparing selective_scan_step_projected");
  const dim3 grid(static_cast<unsigned>(plan.channel_blocks),
                  static_cast<unsigned>(plan.sequence_blocks));
  launch_dependent(state_of(ctx), "selective_scan_step_projected", kernel,
                   {.grid = grid,
                    .block = kThreads,
                    .shared_bytes = scan_step::shared_bytes<S, kSequences, kBlocks>(a.dt_rank)},
                   a);
}

}  // namespace

ScanShape step_shape_of(const SelectiveScan& op) {
  return {.tokens = op.u.shape[0],
          .num_seqs = op.u.shape[0],
          .d_inner = op.u.shape[1],
          .d_state = op.A.shape[1],
          .n_groups = op.B.shape[1],
          .state_bytes = static_cast<int>(size_of(op.state.dtype))};
}

bool scan_step_projects(Context&, const SelectiveScan& op) {
  return op.u.dtype == DType::bf16 && scan_step_projects_shape(step_shape_of(op), op.dt.shape[1]) &&
         vector_rows(op.u, kItem) && vector_rows(op.dt, 8) && vector_rows(op.z, kItem) &&
         vector_rows(op.B, 8) && vector_rows(op.C, 8) && vector_rows(op.y, kItem) &&
         aligned(op.A.data) && aligned(op.state.data) && aligned(op.dt_proj.data);
}

void launch_selective_scan_step_projected(Context& ctx, const SelectiveScan& op) {
  const State& gpu = state_of(ctx);
  const ScanShape shape = step_shape_of(op);
  if (gpu.compute_major >= 9) {
    const ScanStepAheadPlan ahead = plan_selective_scan_step_ahead(
        shape, op.dt.shape[1], gpu.multiprocessors, static_cast<int>(gpu.shared_bytes_per_block));
    if (ahead.faster) return launch_selective_scan_step_ahead(gpu, ahead, op);
  }
  const ScanStepProjectedPlan plan = plan_selective_scan_step_projected(shape, gpu.multiprocessors);
  const Args a = arguments(op);
  dispatch_f32_bf16(op.state.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr int kMany = projected_many_sequences(sizeof(S)), kFew = kProjectedFewSequences;
    if (plan.sequences == kMany && plan.blocks == 4) return launch<S, kMany, 4>(ctx, plan, a);
    if (plan.blocks == 4) return launch<S, kFew, 4>(ctx, plan, a);
    if constexpr (sizeof(S) == 4)
      plan.sequences == kMany ? launch<S, kMany, 8>(ctx, plan, a)
                              : launch<S, kFew, 8>(ctx, plan, a);
  });
}

}  // namespace krait::cuda
