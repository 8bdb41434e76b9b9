// Selective scan on the GPU, one token for each sequence, with dt_proj: the kernel for many
// sequences. Its product costs little beside reading and writing the state, and a launch less.
#include <algorithm>

#include "ops/cuda/arguments.h"
#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/dependent_launch.cuh"
#include "ops/cuda/math.cuh"
#include "ops/cuda/mma.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/engine.h"
#include "ops/selective_scan_plan.h"
#include "ops/selective_scan_step_projected.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = kProjectedThreads, kStates = kProjectedStates, kWarp = 32;
constexpr int kItem = 8;  // neighbouring channels of a sequence: 16 bytes of u, z or y
constexpr int kSkew = 8;  // elements behind a row, so that rows start in different banks

// Of a block, with states of type S.
template <class S>
constexpr int kChannels = projected_channels(sizeof(S));
template <class S>
constexpr int kLanes = kThreads / kChannels<S>;
template <class S>
constexpr int kLaneStates = kStates / kLanes<S>;

struct Args {
  const bf16 *u, *dt, *z, *B, *C, *dt_proj;  // z: null without a gate
  bf16* y;
  int64_t u_row, dt_row, z_row, B_row, C_row, y_row;  // in elements
  const float *A, *D, *dt_bias;                       // D, dt_bias: null when none
  void* state;
  const int32_t* slot;  // null: sequence i has slot i
  int num_seqs, d_inner, dt_rank;
  bool settled;
};

// Behind it rows of dt_proj and dt, kSkew longer than dt_rank; later delta u, (kSequences,
// kChannels), in their place.
template <class S, int kSequences, int kRing>
struct Shared {
  S ring[kRing][kThreads][kLaneStates<S>];
  float delta[kSequences][kChannels<S>];  // first T(dt), then delta, then y's sum over states
  float BC[kSequences][2 * kStates];
  int slot[kSequences];
};

// delta[s][c] = sum over r of dt_proj[c][r] dt[s][r], rounded to bf16. A warp takes every fourth
// tile of 16 channels and 8 sequences.
template <class S, int kSequences, int kRing>
__device__ void project_dt(Shared<S, kSequences, kRing>& shared, const bf16* weight, const bf16* dt,
                           int dt_rank) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4, q = static_cast<int>(threadIdx.x) % 4;
  const int row = dt_rank + kSkew;
  constexpr int kTiles = kChannels<S> / 16;  // along channels
  for (int tile = warp; tile < kTiles * kSequences / 8; tile += kThreads / kWarp) {
    const int c = tile % kTiles * 16, s = tile / kTiles * 8;
    const bf16* a = weight + (c + g) * row + 2 * q;
    const bf16* b = dt + (s + g) * row + 2 * q;
    const auto pair = [](const bf16* p) { return *reinterpret_cast<const uint32_t*>(p); };
    float d[4] = {};
    for (int k = 0; k < dt_rank; k += 16)
      mma_bf16(d, {pair(a + k), pair(a + k + 8 * row), pair(a + k + 8), pair(a + k + 8 * row + 8)},
               pair(b + k), pair(b + k + 8));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      shared.delta[s + 2 * q + i % 2][c + g + i / 2 * 8] =
          __bfloat162float(__float2bfloat16_rn(d[i]));
  }
}

// 16 bytes that nobody reads before the next step.
template <class S>
__device__ void store_streaming(S* p, const Floats<kLaneStates<S>>& h) {
  const Packed<S, kLaneStates<S>> in = pack<S>(h);
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(in.word[0], in.word[1], in.word[2], in.word[3]));
}

// The sum over a channel's states, four after one another and their sums as a tree, for every lane:
// the bits do not depend on how many states a lane has.
template <class S>
__device__ float sum_over_states(const Floats<kLaneStates<S>>& h, const Floats<kLaneStates<S>>& C) {
  constexpr int kParts = kLaneStates<S> / 4;
  float y[kParts] = {};
#pragma unroll
  for (int i = 0; i < kLaneStates<S>; ++i) y[i / 4] = fmaf(C[i], h[i], y[i / 4]);
#pragma unroll
  for (int d = kLanes<S> / 2; d > 0; d /= 2)
#pragma unroll
    for (int i = 0; i < kParts; ++i) y[i] += __shfl_xor_sync(~0u, y[i], d);
#pragma unroll
  for (int d = kParts / 2; d > 0; d /= 2)
#pragma unroll
    for (int i = 0; i < d; ++i) y[i] += y[i + d];
  return y[0];
}

// Grid: x over blocks of kChannels channels, y over groups of kSequences sequences. Four
// neighbouring threads (states in bf16: two) share a channel, each has 16 bytes of its states, so
// that a warp's accesses to the state are 512 contiguous bytes. On chip: rows of dt_proj and of dt
// (bf16), delta, delta u, B and C (f32); a ring of each thread's states of the next kRing
// sequences, on their way from the kernel's beginning on, so that memory is busy while delta is
// computed. Moves 2 x 4 bytes (states in bf16: 2 x 2) for each (sequence, channel, state).
// Barriers: dt_proj and dt are there; dt's product is; delta is; y's sums are. Numerics: dt summed
// in f32 by tensor cores in an order that dt_rank alone decides, then as selective_scan_step_rows:
// the same bits from the same dt.
template <class S, int kSequences, int kRing>
__global__ void __launch_bounds__(kThreads, 4)
    selective_scan_step_projected(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<S, kSequences, kRing>*>(memory);
  const int row = a.dt_rank + kSkew, thread = static_cast<int>(threadIdx.x);
  bf16* const weight = reinterpret_cast<bf16*>(memory + sizeof shared);
  bf16* const dt = weight + kChannels<S> * row;
  float* const delta_u = reinterpret_cast<float*>(weight);
  const int c0 = static_cast<int>(blockIdx.x) * kChannels<S>;
  const int s0 = static_cast<int>(blockIdx.y) * kSequences;
  const int count = min(kSequences, a.num_seqs - s0);
  if (!a.settled) wait_for_earlier_work();

  const int pieces = a.dt_rank / 8;  // of 16 bytes
  for (int i = thread; i < kChannels<S> * pieces; i += kThreads)
    copy_async<16>(shared_address(weight + i / pieces * row + i % pieces * 8),
                   a.dt_proj + int64_t{c0} * a.dt_rank + i * 8);
  end_copies();
  constexpr int kOwn = kLaneStates<S>;
  const int channel = thread / kLanes<S>, c = c0 + channel, n = thread % kLanes<S> * kOwn;
  const auto slot_of = [&](int s) { return a.slot ? a.slot[s0 + s] : s0 + s; };
  const auto state_at = [&](int64_t slot) {
    return static_cast<S*>(a.state) + (slot * a.d_inner + c) * kStates + n;
  };
  const uint32_t ring = shared_address(shared.ring[0][thread]);
  constexpr uint32_t kRingRow = sizeof shared.ring[0];
  int first_slots[kRing];  // all asked for before one is awaited
#pragma unroll
  for (int k = 0; k < kRing; ++k) first_slots[k] = k < count ? slot_of(k) : 0;
#pragma unroll
  for (int k = 0; k < kRing; ++k) {
    if (k < count) copy_async_uncached(ring + k * kRingRow, state_at(first_slots[k]));
    end_copies();
  }
  if (thread < count) shared.slot[thread] = slot_of(thread);
  const Floats<kOwn> A = load_vector<kOwn>(a.A + int64_t{c} * kStates + n);
  constexpr int kItems = kChannels<S> / kItem;
  const int item_s = thread / kItems, item_c = thread % kItems * kItem;
  const bool item = item_s < count;
  Floats<kItem> bias{}, D{};
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    if (a.dt_bias) bias[i] = a.dt_bias[c0 + item_c + i];
    if (a.D) D[i] = a.D[c0 + item_c + i];
  }
  if (a.settled) wait_for_earlier_work();
  let_next_start();

  Packed<bf16, kItem> u{}, z{};
  if (item) {
    u = load_packed<kItem>(a.u + (s0 + item_s) * a.u_row + c0 + item_c);
    if (a.z) z = load_packed<kItem>(a.z + (s0 + item_s) * a.z_row + c0 + item_c);
  }
  for (int i = thread; i < count * 4; i += kThreads) {  // eight of B or C at a time
    const int s = i / 4, part = i % 4 % 2 * 8;
    const bf16* from = i % 4 < 2 ? a.B + (s0 + s) * a.B_row : a.C + (s0 + s) * a.C_row;
    store_vector(shared.BC[s] + i % 4 * 8, load_vector<8>(from + part));
  }
#pragma unroll 4
  for (int i = thread; i < count * pieces; i += kThreads)
    *reinterpret_cast<uint4*>(dt + i / pieces * row + i % pieces * 8) =
        *reinterpret_cast<const uint4*>(a.dt + (s0 + i / pieces) * a.dt_row + i % pieces * 8);
  wait_for_copies<kRing>();  // dt_proj
  __syncthreads();
  project_dt(shared, weight, dt, a.dt_rank);
  __syncthreads();
  if (item) {
    const Floats<kItem> in = unpack(u);
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      float& at = shared.delta[item_s][item_c + i];
      at = softplus(at + bias[i]);
      delta_u[item_s * kChannels<S> + item_c + i] = at * in[i];
    }
  }
  __syncthreads();

#pragma unroll 4
  for (int s = 0, place = 0; s < count; ++s, place = place + 1 == kRing ? 0 : place + 1) {
    wait_for_copies<kRing - 1>();
    Floats<kOwn> h = unpack(load_copied<S, kOwn>(ring + place * kRingRow));
    const float step = shared.delta[s][channel], du = delta_u[s * kChannels<S> + channel];
    const Floats<kOwn> B = load_vector<kOwn>(shared.BC[s] + n);
    const Floats<kOwn> C = load_vector<kOwn>(shared.BC[s] + kStates + n);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      h[i] = fmaf(exp2_approx(step * (A[i] * kLog2E)), h[i], du * B[i]);
    store_streaming(state_at(shared.slot[s]), h);
    if (s + kRing < count)
      copy_async_uncached(ring + place * kRingRow, state_at(shared.slot[s + kRing]));
    end_copies();
    const float y = sum_over_states<S>(h, C);
    if (n == 0) shared.delta[s][channel] = y;
  }
  __syncthreads();
  if (!item) return;
  const Floats<kItem> in = unpack(u), gate = unpack(z);
  Floats<kItem> out;
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    const float sum = fmaf(D[i], in[i], shared.delta[item_s][item_c + i]);
    out[i] = a.z ? sum * silu(gate[i]) : sum;
  }
  store_vector(a.y + (s0 + item_s) * a.y_row + c0 + item_c, out);
}

template <class S, int kSequences, int kRing>
void launch(Context& ctx, const ScanStepProjectedPlan& plan, const Args& a) {
  const auto kernel = selective_scan_step_projected<S, kSequences, kRing>;
  const auto shared_bytes = [](int64_t dt_rank) {
    return sizeof(Shared<S, kSequences, kRing>) +
           std::max(
               (kChannels<S> + kSequences) * static_cast<size_t>(dt_rank + kSkew) * sizeof(bf16),
               kChannels<S> * kSequences * sizeof(float));
  };
  static_assert(sizeof(Shared<S, kSequences, kRing>) < 48 * 1024);
  static const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes(kProjectedMaxRank)));
  check(raised, "preparing selective_scan_step_projected");
  const dim3 grid(static_cast<unsigned>(plan.channel_blocks),
                  static_cast<unsigned>(plan.sequence_blocks));
  launch_dependent(state_of(ctx), "selective_scan_step_projected", kernel,
                   {.grid = grid, .block = kThreads, .shared_bytes = shared_bytes(a.dt_rank)}, a);
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
  const ScanStepProjectedPlan plan =
      plan_selective_scan_step_projected(step_shape_of(op), state_of(ctx).multiprocessors);
  const Args a = {.u = op.u.ptr<bf16>(),
                  .dt = op.dt.ptr<bf16>(),
                  .z = op.z ? op.z.ptr<bf16>() : nullptr,
                  .B = op.B.ptr<bf16>(),
                  .C = op.C.ptr<bf16>(),
                  .dt_proj = op.dt_proj.ptr<bf16>(),
                  .y = op.y.ptr<bf16>(),
                  .u_row = row(op.u),
                  .dt_row = row(op.dt),
                  .z_row = row(op.z),
                  .B_row = row(op.B),
                  .C_row = row(op.C),
                  .y_row = row(op.y),
                  .A = f32(op.A),
                  .D = f32(op.D),
                  .dt_bias = f32(op.dt_bias),
                  .state = op.state.data,
                  .slot = i32(op.slot),
                  .num_seqs = static_cast<int>(op.u.shape[0]),
                  .d_inner = static_cast<int>(op.u.shape[1]),
                  .dt_rank = static_cast<int>(op.dt.shape[1]),
                  .settled = op.settled};
  dispatch_f32_bf16(op.state.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr int kMany = projected_many_sequences(sizeof(S));
    if (plan.sequences == kMany)
      launch<S, kMany, 12>(ctx, plan, a);  // what four blocks have room for
    else
      launch<S, kProjectedFewSequences, kProjectedFewSequences>(ctx, plan, a);
  });
}

}  // namespace krait::cuda
