// What blocks of the streams' backward pass have in shared memory, and what their warps hand
// around.
#pragma once

#include "ops/cuda/mma.cuh"
#include "ops/selective_scan_bwd_streams.cuh"

namespace krait::cuda::scan_streams {

inline constexpr int kRun = 8;  // tokens that are in registers at a time
inline constexpr int kRuns = kTile / kRun;
// Tokens of a run whose A_bar is computed while the run behind it is walked: exps one after the
// other hold a warp up, among products they do not.
inline constexpr int kEarly = 6;
inline constexpr int kRowPitch = 36;  // floats: tokens 2q lie 8 banks apart
inline constexpr int kDyPitch = 20;
inline constexpr int kLaneStates = 32 * 4;  // floats: four states of each lane

template <int kWarps>
struct Shared {
  struct Warp {
    // delta, delta u of pairs of channels; behind each row there is room for 16 bytes of a lane
    float rows[kTile][kRowPitch];
    float dy[kRun][kDyPitch];             // dy silu(z) of a run
    float states[kRuns][2][kLaneStates];  // before each run
    float constants[8][4];                // D and dt_bias of pairs of channels
    float kept[4][kLaneStates];  // what the lanes would keep in registers: y and inputs of a run,
                                 // dD and ddt_bias
    float parts[kRun][kLaneStates];  // the lanes' q and w
  };
  float sums[2][kWarps][2][kLaneStates];  // dB, dC of a run, by warp; two take turns
  float bc[kTile][2 * kWarpStates];
  float identity[2][kLaneStates];  // as operand A, above zeros and below
  float* partial[128];             // where the threads' sums of dB and dC go, first token
  Warp warp[kWarps];
};

// Where the warps share 16 channels, 16 states of each.
template <int kWarps>
struct WideShared {
  static constexpr int kStates = kWarps * kWarpStates, kThreads = 32 * kWarps;
  // Outside of the states a thread has a token of the run, and as many of its channels.
  static constexpr int kOwn = kWarps == 2 ? 2 : 1;
  static constexpr int kOwners = kRun * kScanStreamsChannels / kOwn;  // threads that do
  struct Warp {
    float states[kRuns][2][kLaneStates];  // before each run
    float parts[kRun][kLaneStates];       // the lanes' q and w of a run
    float y[kLaneStates];                 // of the warp's states
  };
  float rows[kTile][kRowPitch];              // delta, delta u of pairs of channels
  float dy[kRun][kDyPitch];                  // dy silu(z) of a run
  float constants[2][kScanStreamsChannels];  // D, dt_bias
  float identity[2][kLaneStates];            // as operand A, above zeros and below
  Warp warp[kWarps];
  float bc[kTile][2 * kStates];
  uint4 inputs[kOwners];          // u, dt, z, dy of the run
  float gates[kOwners][kOwn];     // sigmoid of z
  float sums[kOwners][2 * kOwn];  // dD, ddt_bias
  float* partial[kThreads];       // where the threads' sums of dB go, first token
  uint64_t finished;              // mbarrier: the warps are done with a run
};

// The thread's number, read afresh: what follows from it is computed where it is needed, else the
// compiler keeps it, in local memory, whose loads wait behind those from global memory.
__device__ __forceinline__ uint32_t this_thread() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Without a branch, which would end what the compiler schedules as one.
__device__ __forceinline__ void store_pair_if(bool there, bf16* to, const Floats<2>& v) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.b32 [%1], %2;}" ::"r"(
                   static_cast<uint32_t>(there)),
               "l"(__cvta_generic_to_global(to)), "r"(pack<bf16>(v).word[0]));
}

// delta is zero where there is no token: that leaves states and gradients as they are.
struct Pairs {
  Packed<bf16, 2> u[2], dt[2], z[2], dy[2];  // of two tokens
};

// A channel of a token: inputs, the sigmoid of z, and y, q, w over all states.
struct Element {
  float u, dt, z, dy, s, delta, D, dt_bias, y, q, w;
};
struct ElementGrad {
  float du, ddt, dz, y, dy;  // dy: before the gate
};
__device__ __forceinline__ ElementGrad gradients(const Element& e) {
  ElementGrad r;
  const float gate = e.z * e.s;
  r.dy = e.dy * gate;
  const float before_gate = fmaf(e.D, e.u, e.y * (1 + kCutToTf32));
  r.du = fmaf(e.q, e.delta, r.dy * e.D);
  r.ddt = fmaf(e.q, e.u, e.w * kLn2) * sigmoid(e.dt + e.dt_bias);
  r.dz = e.dy * before_gate * fmaf(gate, 1.f - e.s, e.s);
  r.y = before_gate * gate;
  return r;
}

// Two channels of two tokens.
struct Outputs {
  float y[2][2], q[2][2], w[2][2];
};

}  // namespace krait::cuda::scan_streams
