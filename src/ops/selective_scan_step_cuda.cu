// Selective scan on the GPU, one token for each sequence: the state is read and written once.
#include "core/dtype.h"
#include "ops/cuda/arguments.h"
#include "ops/cuda/math.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/engine.h"
#include "ops/selective_scan_plan.h"
#include "ops/selective_scan_step_projected.h"

namespace krait::cuda {
namespace {

struct Args {
  const void *u, *dt, *z, *B, *C;  // z: null without a gate
  void* y;
  int64_t u_row, dt_row, z_row, B_row, C_row, y_row;  // in elements
  int64_t B_group, C_group;
  const float *A, *D, *dt_bias;  // D, dt_bias: null when none
  void* state;
  const int32_t* slot;  // null: sequence i has slot i
  int num_seqs, d_inner, d_state, group_width, lanes;
  bool vector_state;   // A and state may be read four states at a time
  bool vector_inputs;  // B and C likewise
};

// Up to four neighbouring elements, `count` of them there.
template <class T>
__device__ Floats<4> load_four(const T* p, int count, bool vector) {
  if (vector) return load_vector<4>(p);
  Floats<4> x{};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) x[i] = load_vector<1>(p + i)[0];
  return x;
}

// Grid: x over (channel, lane), y over groups of kSequences sequences. `lanes` neighbouring threads
// share a channel, each takes every lanes-th quad of its states, so that a warp's accesses to the
// state are contiguous; A is read once for kSequences sequences, whose loads are under way
// together. Moves 2 x 4 bytes (states in bf16: 2 x 2) for each (sequence, channel, state); A, B and
// C come from the caches. y is summed over the lanes as a tree, from states before they are
// rounded.
template <class T, class S, int kSequences>
__global__ void __launch_bounds__(kStepThreads)
    selective_scan_step_rows(const __grid_constant__ Args a) {
  const int lane = static_cast<int>(threadIdx.x) % a.lanes;
  const int thread_c = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / a.lanes);
  const bool there = thread_c < a.d_inner;
  const int c = there ? thread_c : 0,
            group = c / a.group_width;  // every lane takes part in the sum
  const int64_t s0 = int64_t{blockIdx.y} * kSequences;
  const float bias = a.dt_bias ? a.dt_bias[c] : 0.f, D = a.D ? a.D[c] : 0.f;
  float u[kSequences], z[kSequences], delta[kSequences], y[kSequences] = {};
  S* state[kSequences];
  bool live[kSequences];
#pragma unroll
  for (int k = 0; k < kSequences; ++k) {
    live[k] = there && s0 + k < a.num_seqs;
    const int64_t s = live[k] ? s0 + k : 0;
    state[k] = static_cast<S*>(a.state) + ((a.slot ? a.slot[s] : s) * a.d_inner + c) * a.d_state;
    u[k] = load_vector<1>(static_cast<const T*>(a.u) + s * a.u_row + c)[0];
    z[k] = a.z ? load_vector<1>(static_cast<const T*>(a.z) + s * a.z_row + c)[0] : 0.f;
    delta[k] = load_vector<1>(static_cast<const T*>(a.dt) + s * a.dt_row + c)[0] + bias;
  }
  for (int n = lane * 4; n < a.d_state && there; n += a.lanes * 4) {
    const int count = min(4, a.d_state - n);
    Floats<4> h[kSequences], B[kSequences], C[kSequences];
    Floats<4> A = load_four(a.A + static_cast<int64_t>(c) * a.d_state + n, count, a.vector_state);
#pragma unroll
    for (int k = 0; k < kSequences; ++k) {
      const int64_t s = live[k] ? s0 + k : 0;
      h[k] = load_four(state[k] + n, count, a.vector_state);
      B[k] = load_four(static_cast<const T*>(a.B) + s * a.B_row + group * a.B_group + n, count,
                       a.vector_inputs);
      C[k] = load_four(static_cast<const T*>(a.C) + s * a.C_row + group * a.C_group + n, count,
                       a.vector_inputs);
    }
#pragma unroll
    for (int k = 0; k < kSequences; ++k) {
      const float step = softplus(delta[k]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        h[k][i] = fmaf(exp2_approx(step * (A[i] * kLog2E)), h[k][i], step * u[k] * B[k][i]);
        y[k] = fmaf(C[k][i], h[k][i], y[k]);
      }
      if (!live[k]) continue;
      if (a.vector_state) {
        store_vector<4>(state[k] + n, h[k]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < count) store_vector(state[k] + n + i, Floats<1>{{h[k][i]}});
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kSequences; ++k) {
    for (int d = a.lanes / 2; d > 0; d /= 2) y[k] += __shfl_xor_sync(~0u, y[k], d);
    if (lane > 0 || !live[k]) continue;
    const float sum = fmaf(D, u[k], y[k]);
    store_vector<1>(static_cast<T*>(a.y) + (s0 + k) * a.y_row + c,
                    Floats<1>{{a.z ? sum * silu(z[k]) : sum}});
  }
}

}  // namespace

void selective_scan_step(Context& ctx, const SelectiveScan& op) {
  if (op.dt_proj) return launch_selective_scan_step_projected(ctx, op);
  const ScanStepPlan plan =
      plan_selective_scan_step(step_shape_of(op), state_of(ctx).multiprocessors);
  const Args a = {
      .u = op.u.data,
      .dt = op.dt.data,
      .z = op.z.data,
      .B = op.B.data,
      .C = op.C.data,
      .y = op.y.data,
      .u_row = row(op.u),
      .dt_row = row(op.dt),
      .z_row = row(op.z),
      .B_row = row(op.B),
      .C_row = row(op.C),
      .y_row = row(op.y),
      .B_group = op.B.stride[1],
      .C_group = op.C.stride[1],
      .A = f32(op.A),
      .D = f32(op.D),
      .dt_bias = f32(op.dt_bias),
      .state = op.state.data,
      .slot = i32(op.slot),
      .num_seqs = static_cast<int>(op.u.shape[0]),
      .d_inner = static_cast<int>(op.u.shape[1]),
      .d_state = static_cast<int>(op.A.shape[1]),
      .group_width = static_cast<int>(op.u.shape[1] / op.B.shape[1]),
      .lanes = plan.lanes,
      .vector_state = op.A.shape[1] % 4 == 0 && aligned(op.A.data) && aligned(op.state.data),
      .vector_inputs = vector_rows(op.B, 4) && vector_rows(op.C, 4)};
  const dim3 grid(static_cast<unsigned>(plan.channel_blocks),
                  static_cast<unsigned>(plan.sequence_blocks));
  const cudaStream_t stream = state_of(ctx).stream;
  dispatch_f32_bf16(op.u.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_f32_bf16(op.state.dtype, [&](auto state_tag) {
      using S = typename decltype(state_tag)::type;
      if (plan.sequences == 1)
        selective_scan_step_rows<T, S, 1><<<grid, kStepThreads, 0, stream>>>(a);
      else
        selective_scan_step_rows<T, S, kStepSequences><<<grid, kStepThreads, 0, stream>>>(a);
    });
  });
  check_launch("selective_scan_step_rows");
}

}  // namespace krait::cuda
