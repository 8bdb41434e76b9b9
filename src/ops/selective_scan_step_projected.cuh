// What a block does in a step of the selective scan with dt_proj, for many sequences. Its product
// costs little beside reading and writing the state, and a launch less.
#pragma once

#include <algorithm>

#include "ops/cuda/arguments.h"
#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/dependent_launch.cuh"
#include "ops/cuda/math.cuh"
#include "ops/cuda/mma.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/selective_scan.h"
#include "ops/selective_scan_plan.h"

namespace krait::cuda::scan_step {

constexpr int kThreads = kProjectedThreads, kStates = kProjectedStates, kWarp = 32;
constexpr int kItem = 8;    // neighbouring channels of a sequence: 16 bytes of u, z or y
constexpr int kTerms = 32;  // of dt's product, that the four lanes of a row read with 16 bytes each
constexpr int kSkew = 8;    // elements behind a row, so that rows start in different banks

// Of a block, with states of type S.
template <class S>
constexpr int kChannels = projected_channels(sizeof(S));
template <class S>
constexpr int kLanes = kThreads / kChannels<S>;
template <class S>
constexpr int kLaneStates = kStates / kLanes<S>;

// Sequences whose states are on their way at once: as many as kBlocks blocks of a multiprocessor
// have room for.
template <int kSequences, int kBlocks>
constexpr int kRing = kSequences == kProjectedFewSequences ? kSequences
                      : kBlocks == 4                       ? 12
                                                           : 7;
// Four blocks have room for dt_proj and dt, too.
template <int kBlocks>
constexpr bool kStaged = kBlocks == 4;

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
template <class S, int kSequences, int kBlocks>
struct Shared {
  S ring[kRing<kSequences, kBlocks>][kThreads][kLaneStates<S>];
  float delta[kSequences][kChannels<S>];  // first T(dt), then delta, then y's sum over states
  float BC[kSequences][2 * kStates];
  int slot[kSequences];
};

// delta[s][c] = sum over r of weight[c][r] dt[s][r], rounded to bf16, of sequences s below count. A
// warp has 16 of the block's channels and every kStep-th eight of its sequences. The four lanes of
// a row read 32 terms of it with 16 bytes each: in the order of terms that this makes, which is the
// same for both operands, and wherever they lie.
template <class S, int kSequences>
__device__ __forceinline__ void project_dt(float (*delta)[kChannels<S>], const bf16* weight,
                                           int weight_row, const bf16* dt, int64_t dt_row,
                                           int count, int dt_rank) {
  constexpr int kTiles = kChannels<S> / 16, kStep = kThreads / kWarp / kTiles;
  constexpr int kOwn = (kSequences / 8 + kStep - 1) / kStep;  // eights of sequences
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, q = lane % 4, c = warp % kTiles * 16 + g, s0 = warp / kTiles * 8;
  if (s0 >= kSequences) return;
  const auto terms = [&](const bf16* row, int first) {
    return row && first < dt_rank ? load_packed<8>(row + first) : Packed<bf16, 8>{};
  };
  const bf16 *low = weight + c * weight_row, *high = low + 8 * weight_row;
  const bf16* row[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int s = s0 + j * kStep * 8 + g;
    row[j] = s < count ? dt + s * dt_row : nullptr;
  }
  float d[kOwn][4] = {};
#pragma unroll 2
  for (int k = q * 8; k < dt_rank + q * 8; k += kTerms) {
    const Packed<bf16, 8> a = terms(low, k), b = terms(high, k);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const Packed<bf16, 8> x = terms(row[j], k);
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        mma_bf16(d[j], {a.word[i], b.word[i], a.word[i + 1], b.word[i + 1]}, x.word[i],
                 x.word[i + 1]);
    }
  }
#pragma unroll
  for (int j = 0; j < kOwn; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      delta[s0 + j * kStep * 8 + 2 * q + i % 2][c + i / 2 * 8] =
          __bfloat162float(__float2bfloat16_rn(d[j][i]));
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

// A block has kChannels channels of kSequences sequences. Four neighbouring threads (states in
// bf16: two) share a channel, each has 16 bytes of its states, so that a warp's accesses to the
// state are 512 contiguous bytes. On chip: delta, delta u, B and C (f32); a ring of each thread's
// states of the next kRing sequences, on their way from the kernel's beginning on, so that memory
// is busy while delta is computed. Of four blocks on a multiprocessor each has rows of dt_proj and
// of dt (bf16) besides; eight, for which registers and room do not suffice for these, read them
// where they lie, and start at once where four would take turns. Moves 2 x 4 bytes (states in bf16:
// 2 x 2) for each (sequence, channel, state). Barriers: dt_proj and dt are there (of four blocks);
// dt's product is; delta is; y's sums are. Numerics: dt summed in f32 by tensor cores in an order
// that dt_rank alone decides, then as selective_scan_step_rows: the same bits from the same dt.
template <class S, int kSequences, int kBlocks>
__device__ __forceinline__ void run(const Args& a, unsigned char* memory, int channel_block,
                                    int sequence_block) {
  auto& shared = *reinterpret_cast<Shared<S, kSequences, kBlocks>*>(memory);
  constexpr bool kStaged = scan_step::kStaged<kBlocks>;
  constexpr int kRing = scan_step::kRing<kSequences, kBlocks>;
  const int row = a.dt_rank + kSkew, thread = static_cast<int>(threadIdx.x);
  bf16* const weight = reinterpret_cast<bf16*>(memory + sizeof shared);
  bf16* const dt = weight + kChannels<S> * row;
  float* const delta_u = reinterpret_cast<float*>(weight);
  const int c0 = channel_block * kChannels<S>;
  const int s0 = sequence_block * kSequences;
  const int count = min(kSequences, a.num_seqs - s0);
  if (!a.settled) wait_for_earlier_work();

  const int pieces = a.dt_rank / 8;  // of 16 bytes
  const bf16* const dt_proj = a.dt_proj + int64_t{c0} * a.dt_rank;
  if constexpr (kStaged) {
    for (int i = thread; i < kChannels<S> * pieces; i += kThreads)
      copy_async<16>(shared_address(weight + i / pieces * row + i % pieces * 8), dt_proj + i * 8);
    end_copies();
  } else {
    for (int i = thread * 64; i < kChannels<S> * a.dt_rank; i += kThreads * 64)
      prefetch_to_l2(dt_proj + i);
  }
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
  const auto of_channels = [&](const float* p) {
    Floats<kItem> x{};
#pragma unroll
    for (int i = 0; i < kItem; ++i)
      if (p) x[i] = p[c0 + item_c + i];
    return x;
  };
  // Where registers are few, they are loaded where they are needed.
  Floats<kItem> bias{}, D{};
  if constexpr (kStaged) bias = of_channels(a.dt_bias), D = of_channels(a.D);
  if (a.settled) wait_for_earlier_work();
  let_next_start();

  Packed<bf16, kItem> u{}, z{};
  if (item) {
    u = load_packed<kItem>(a.u + (s0 + item_s) * a.u_row + c0 + item_c);
    if (a.z) z = load_packed<kItem>(a.z + (s0 + item_s) * a.z_row + c0 + item_c);
  }
  static_assert(kSequences * 4 <= kThreads);
  const bool bc = thread < count * 4;  // has eight of B or C
  Packed<bf16, kItem> BC{};
  if (bc) {
    const int s = s0 + thread / 4, part = thread % 2 * kItem;
    BC = load_packed<kItem>(thread % 4 < 2 ? a.B + s * a.B_row + part : a.C + s * a.C_row + part);
  }
  if constexpr (kStaged) {
#pragma unroll 4
    for (int i = thread; i < count * pieces; i += kThreads)
      *reinterpret_cast<uint4*>(dt + i / pieces * row + i % pieces * 8) =
          *reinterpret_cast<const uint4*>(a.dt + (s0 + i / pieces) * a.dt_row + i % pieces * 8);
  } else {
    project_dt<S, kSequences>(shared.delta, dt_proj, a.dt_rank, a.dt + s0 * a.dt_row, a.dt_row,
                              count, a.dt_rank);
  }
  if (bc) store_vector(shared.BC[thread / 4] + thread % 4 * kItem, unpack(BC));
  if constexpr (kStaged) {
    wait_for_copies<kRing>();  // dt_proj
    __syncthreads();
    project_dt<S, kSequences>(shared.delta, weight, row, dt, row, count, a.dt_rank);
  }
  __syncthreads();
  if (item) {
    const Floats<kItem> in = unpack(u);
    if constexpr (!kStaged) bias = of_channels(a.dt_bias);
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
  if constexpr (!kStaged) D = of_channels(a.D);
  Floats<kItem> out;
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    const float sum = fmaf(D[i], in[i], shared.delta[item_s][item_c + i]);
    out[i] = a.z ? sum * silu(gate[i]) : sum;
  }
  store_vector(a.y + (s0 + item_s) * a.y_row + c0 + item_c, out);
}

inline Args arguments(const SelectiveScan& op) {
  return {.u = op.u.ptr<bf16>(),
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
}

// Bytes of a block's shared memory.
template <class S, int kSequences, int kBlocks>
constexpr size_t shared_bytes(int dt_rank) {
  const size_t staged = (kChannels<S> + kSequences) * static_cast<size_t>(dt_rank + kSkew) *
                        sizeof(bf16),
               delta_u = kChannels<S> * kSequences * sizeof(float);
  return sizeof(Shared<S, kSequences, kBlocks>) +
         (kStaged<kBlocks> ? std::max(staged, delta_u) : delta_u);
}

}  // namespace krait::cuda::scan_step
