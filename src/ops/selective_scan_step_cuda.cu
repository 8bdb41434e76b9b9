// Selective scan on the GPU, one token for each sequence: the state is read and written once.
#include "core/dtype.h"
#include "ops/cuda/math.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/engine.h"
#include "ops/selective_scan_plan.h"

namespace krait::cuda {
namespace {

struct Args {
  const void *u, *dt, *z, *B, *C;  // z: null without a gate
  void* y;
  int64_t u_row, dt_row, z_row, B_row, C_row, y_row;  // in elements
  int64_t B_group, C_group;
  const float *A, *D, *dt_bias;  // D, dt_bias: null when none
  float* state;
  const int32_t* slot;  // null: sequence i has slot i
  int d_inner, d_state, group_width, lanes;
  int64_t rows;      // sequences x channels
  bool vector_rows;  // A and state may be read four states at a time
};

// Grid: threads in x over (sequence, channel, lane); `lanes` neighbouring threads share a channel,
// each takes every lanes-th quad of its states, so that a warp's accesses to the state are
// contiguous. Moves 2 x 4 bytes of state for each (sequence, channel, state), once; A, B and C come
// from the caches. y is summed over the lanes as a tree.
template <class T>
__global__ void __launch_bounds__(128) selective_scan_step_rows(const __grid_constant__ Args a) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % a.lanes;
  const bool there = thread / a.lanes < a.rows;
  const int64_t row = there ? thread / a.lanes : 0;  // every lane takes part in the sum
  const int64_t s = row / a.d_inner;
  const int c = static_cast<int>(row % a.d_inner), group = c / a.group_width;
  const int64_t place = a.slot ? a.slot[s] : s;
  const float u = load_vector<1>(static_cast<const T*>(a.u) + s * a.u_row + c)[0];
  const float dt = load_vector<1>(static_cast<const T*>(a.dt) + s * a.dt_row + c)[0];
  const float z = a.z ? load_vector<1>(static_cast<const T*>(a.z) + s * a.z_row + c)[0] : 0.f;
  const float delta = softplus(dt + (a.dt_bias ? a.dt_bias[c] : 0.f)), delta_u = delta * u;
  const T* B = static_cast<const T*>(a.B) + s * a.B_row + group * a.B_group;
  const T* C = static_cast<const T*>(a.C) + s * a.C_row + group * a.C_group;
  const float* A = a.A + static_cast<int64_t>(c) * a.d_state;
  float* state = a.state + (place * a.d_inner + c) * a.d_state;
  float y = 0;
  for (int n0 = lane * 4; n0 < a.d_state && there; n0 += a.lanes * 4) {
    const int count = min(4, a.d_state - n0);
    float h[4] = {}, rate[4] = {}, b[4] = {}, c4[4] = {};
    if (a.vector_rows) {
      *reinterpret_cast<float4*>(h) = *reinterpret_cast<const float4*>(state + n0);
      *reinterpret_cast<float4*>(rate) = *reinterpret_cast<const float4*>(A + n0);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) {
        if (!a.vector_rows) h[i] = state[n0 + i], rate[i] = A[n0 + i];
        b[i] = load_vector<1>(B + n0 + i)[0], c4[i] = load_vector<1>(C + n0 + i)[0];
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      h[i] = fmaf(exp2_approx(delta * (rate[i] * kLog2E)), h[i], delta_u * b[i]);
      y = fmaf(c4[i], h[i], y);
    }
    if (a.vector_rows) *reinterpret_cast<float4*>(state + n0) = *reinterpret_cast<float4*>(h);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!a.vector_rows && i < count) state[n0 + i] = h[i];
  }
  for (int d = a.lanes / 2; d > 0; d /= 2) y += __shfl_xor_sync(~0u, y, d);
  if (lane > 0 || !there) return;
  if (a.D) y = fmaf(a.D[c], u, y);
  if (a.z) y *= silu(z);
  store_vector<1>(static_cast<T*>(a.y) + s * a.y_row + c, Floats<1>{{y}});
}

}  // namespace

void selective_scan_step(Context& ctx, const SelectiveScan& op) {
  const ScanStepPlan plan = plan_selective_scan_step({.tokens = op.u.shape[0],
                                                      .num_seqs = op.u.shape[0],
                                                      .d_inner = op.u.shape[1],
                                                      .d_state = op.A.shape[1],
                                                      .n_groups = op.B.shape[1]});
  const auto row = [](const Tensor& t) { return t ? t.stride[0] : 0; };
  const auto f32 = [](const Tensor& t) { return t ? t.ptr<float>() : nullptr; };
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
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
      .state = f32(op.state),
      .slot = op.slot ? op.slot.ptr<int32_t>() : nullptr,
      .d_inner = static_cast<int>(op.u.shape[1]),
      .d_state = static_cast<int>(op.A.shape[1]),
      .group_width = static_cast<int>(op.u.shape[1] / op.B.shape[1]),
      .lanes = plan.lanes,
      .rows = op.u.shape[0] * op.u.shape[1],
      .vector_rows = op.A.shape[1] % 4 == 0 && aligned(op.A.data) && aligned(op.state.data)};
  const dim3 grid(static_cast<unsigned>(plan.blocks)), block(static_cast<unsigned>(plan.threads));
  const cudaStream_t stream = state_of(ctx).stream;
  dispatch_f32_bf16(op.u.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    selective_scan_step_rows<T><<<grid, block, 0, stream>>>(a);
  });
  check_launch("selective_scan_step_rows");
}

}  // namespace krait::cuda
