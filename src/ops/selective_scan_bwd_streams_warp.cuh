// What a warp of the streams' backward pass does with a run of a tile: 16 channels, 16 states of
// each. See selective_scan_bwd_streams_cuda.cu.
#pragma once

#include "ops/cuda/mma.cuh"
#include "ops/selective_scan_bwd_streams_shared.cuh"

namespace krait::cuda::scan_streams {

// Places: where things are in shared memory, in floats: kStatesAt and kPartsAt beyond lane_at,
// kDyAt beyond dy_at, kIdentity (bytes) beyond block_at; kStates: of a channel, in all warps;
// kPartsByChannel.
template <class Places>
struct WarpScan {
  static constexpr int kStates = Places::kStates;
  static constexpr int kBcRow = 2 * kStates;
  // Where q and w of channel c are among a lane's parts: by quantity, or by channel.
  static constexpr int q_at(int c) { return Places::kPartsByChannel ? 2 * c : c; }
  static constexpr int w_at(int c) { return Places::kPartsByChannel ? 2 * c + 1 : 2 + c; }
  const Args& a;
  int g, q, channel;  // the lane's pair of channels starts there
  int64_t state_at;   // of its first channel's states in (d_inner, d_state)
  // Places in shared memory: the block's; the rows of the pair of channels, at 16 and at 8 bytes
  // for each; the lane's; the quad of states in bc.
  uint32_t block_at, pair_at, dy_at, lane_at, bc_at;
  float A[2][4], carry[2][4], dA[2][4];

  __device__ __forceinline__ explicit WarpScan(const Args& args) : a(args) {}

  // By one warp.
  __device__ __forceinline__ void put_identity(float (&identity)[2][kLaneStates]) const {
    const uint32_t lane = this_thread() % 32;
    const float one = g == q ? 1.f : 0.f, one4 = g == q + 4 ? 1.f : 0.f;
    *reinterpret_cast<float4*>(&identity[0][lane * 4]) = make_float4(one, 0, one4, 0);
    *reinterpret_cast<float4*>(&identity[1][lane * 4]) = make_float4(0, one, 0, one4);
  }

  __device__ __forceinline__ uint32_t run_rows(int j) const {
    return pair_at + static_cast<uint32_t>(j) * kRun * kRowPitch * 4;
  }
  __device__ __forceinline__ uint32_t run_states(int j) const {
    return lane_at + static_cast<uint32_t>(j) * 2 * kLaneStates * 4;
  }
  __device__ __forceinline__ uint32_t run_bc(int j) const {
    return bc_at + static_cast<uint32_t>(j) * kRun * kBcRow * 4;
  }
  static __device__ __forceinline__ void zero(float (&v)[2][4]) {
#pragma unroll
    for (int s = 0; s < 4; ++s) v[0][s] = v[1][s] = 0;
  }
  __device__ __forceinline__ void load_before(float (&h)[2][4], int j) const {
    load4(h[0], run_states(j), Places::kStatesAt),
        load4(h[1], run_states(j), Places::kStatesAt + kLaneStates);
  }
  // The lane's states from, and to, (d_inner, d_state); null: zeros.
  __device__ __forceinline__ void load_states(float (&v)[2][4], const float* from) const {
    if (!from) return zero(v);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const Floats<4> x = load_vector<4>(from + state_at + c * kStates);
#pragma unroll
      for (int s = 0; s < 4; ++s) v[c][s] = x[s];
    }
  }
  __device__ __forceinline__ void store_states(const float (&v)[2][4], float* to) const {
#pragma unroll
    for (int c = 0; c < 2; ++c)
      *reinterpret_cast<float4*>(to + state_at + c * kStates) =
          make_float4(v[c][0], v[c][1], v[c][2], v[c][3]);
  }

  __device__ __forceinline__ void load_A() {
    load_states(A, a.A);
#pragma unroll
    for (int s = 0; s < 4; ++s) A[0][s] *= kLog2E, A[1][s] *= kLog2E;
  }

  __device__ const float* before_tile(const Piece& p, int t0) const {
    return t0 > p.seq_begin ? a.saved + (t0 / kTile - 1) * plane_of(a)
           : a.state        ? a.state + p.state_row * plane_of(a)
                            : nullptr;
  }

  // From h before the tile to h before its last run, leaving those before each run in shared
  // memory.
  __device__ __forceinline__ void scan_to_last_run(float (&h)[2][4], int last) const {
    const auto store = [&](int j) {
#pragma unroll
      for (int c = 0; c < 2; ++c)
        store4(run_states(j), Places::kStatesAt + c * kLaneStates, h[c][0], h[c][1], h[c][2],
               h[c][3]);
    };
    float d[4], B[4];  // delta, delta u; a token ahead, since loads may not overtake stores
    load4(d, run_rows(0)), load4(B, run_bc(0));
#pragma unroll 1
    for (int j = 0; j < last; ++j) {
      const uint32_t row = run_rows(j), b = run_bc(j);
      store(j);
#pragma unroll
      for (int t = 0; t < kRun; ++t) {
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int s = 0; s < 4; ++s)
            h[c][s] = fmaf(exp2_approx(d[c] * A[c][s]), h[c][s], d[2 + c] * B[s]);
        load4(d, row, (t + 1) * kRowPitch), load4(B, b, (t + 1) * kBcRow);
      }
    }
    store(last);
  }

  using Run = float[kRun][2][4];

  // A_bar of a token of the run whose rows those are.
  __device__ __forceinline__ void decay(float (&a_bar)[2][4], uint32_t row, int t) const {
    float delta[2];
    load2(delta, row, t * kRowPitch);
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int s = 0; s < 4; ++s) a_bar[c][s] = exp2_approx(delta[c] * A[c][s]);
  }

  // A_bar of the run's tokens from kEarly on, h, and y of the warp's states: of tokens 2q and 2q +
  // 1, two channels each.
  __device__ __forceinline__ void run_forward(int j, const float (&before)[2][4], Run& a_bar,
                                              Run& h, float (&y)[2][2]) const {
    const uint32_t row = run_rows(j), b = run_bc(j);
    y[0][0] = y[0][1] = y[1][0] = y[1][1] = 0;
    float C[4];  // of token g
    load4(C, b + static_cast<uint32_t>(g) * kBcRow * 4, kStates);
#pragma unroll
    for (int t = 0; t < kRun; ++t) {
      float delta_u[2], B[4];
      if (t >= kEarly) decay(a_bar[t], row, t);
      load2(delta_u, row, t * kRowPitch + 2);
      load4(B, b, t * kBcRow);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s)
          h[t][c][s] = fmaf(a_bar[t][c][s], t == 0 ? before[c][s] : h[t > 0 ? t - 1 : 0][c][s],
                            delta_u[c] * B[s]);
      float all[4];  // channels, by tokens whose C it is
      mma_from_zero(all, h[t][0][0], h[t][1][0], h[t][0][1], h[t][1][1], C[0], C[1]);
      mma(all, h[t][0][2], h[t][1][2], h[t][0][3], h[t][1][3], C[2], C[3]);
      const bool own = q == t / 2;
      y[t % 2][0] = own ? all[t % 2] : y[t % 2][0];
      y[t % 2][1] = own ? all[2 + t % 2] : y[t % 2][1];
    }
  }

  // sum += v over the pairs of channels, into a column of it: d0 + d2 is state 4 (g % 4) + g / 4 *
  // 2 of token q, d1 + d3 the next state.
  __device__ __forceinline__ void add_channels(float (&sum)[4], const float (&v)[4],
                                               const float (&column)[2],
                                               const float (&identity)[2][4]) const {
    float turned[4];  // rows: states, the odd ones 8 below; columns: pairs of channels
    mma_from_zero(turned, identity[0][0], identity[0][1], identity[0][2], identity[0][3], v[0],
                  v[2]);
    mma(turned, identity[1][0], identity[1][1], identity[1][2], identity[1][3], v[1], v[3]);
    mma(sum, turned[0], turned[1], turned[2], turned[3], column[0], column[1]);
  }

  // dB: dh delta u; dC: dy h; q: sum of dh B; w: sum of dh A_bar h A. Leaves A_bar of the first
  // kEarly tokens of the run before it (where the tile begins, of the last one of the tile before).
  // Sums are stored behind the loads of the next token, which may not overtake stores.
  template <class PutSums>
  __device__ __forceinline__ void run_back(int j, Run& a_bar, const Run& h,
                                           const PutSums& put_sums) {
    const uint32_t row = run_rows(j), next_row = run_rows((j - 1) & (kRuns - 1)), b = run_bc(j);
    const uint32_t identity = block_at + Places::kIdentity + this_thread() % 32 * 16;
    float dB[4], dC[4];  // of four tokens
    float parts[4];      // of the token behind
    float sums[4];       // dB, dC of the four tokens behind
    float ones[2][4];
    load4(ones[0], identity), load4(ones[1], identity, kLaneStates);
#pragma unroll
    for (int t = kRun - 1; t >= 0; --t) {
      if (t % 4 == 3) dB[0] = dB[1] = dB[2] = dB[3] = dC[0] = dC[1] = dC[2] = dC[3] = 0;
      float d[4], dy[2], B[4], C[4];
      load4(d, row, t * kRowPitch);
      load2(dy, dy_at, Places::kDyAt + t * kDyPitch);
      load4(B, b, t * kBcRow);
      load4(C, b, t * kBcRow + kStates);
      if (t == kRun / 2 - 1) put_sums(1, sums);
      if (t < kRun - 1)
        store4(lane_at, Places::kPartsAt + (t + 1) * kLaneStates, parts[0], parts[1], parts[2],
               parts[3]);
      float before[2][4];
      if (t == 0) {
        load_before(before, j);
      } else {
#pragma unroll
        for (int s = 0; s < 4; ++s) before[0][s] = h[t - 1][0][s], before[1][s] = h[t - 1][1][s];
      }
      float qw[4], xdh[4], dyh[4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        dyh[s] = fmaf(dy[1], h[t][1][s], dy[0] * h[t][0][s]);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float dh = fmaf(dy[c], C[s], carry[c][s]);
          xdh[s] = c == 0 ? d[2 + c] * dh : fmaf(d[2 + c], dh, xdh[s]);
          qw[q_at(c)] = s == 0 ? dh * B[s] : fmaf(dh, B[s], qw[q_at(c)]);
          carry[c][s] = dh * a_bar[t][c][s];
          const float decayed = carry[c][s] * before[c][s];
          qw[w_at(c)] = s == 0 ? decayed * A[c][s] : fmaf(decayed, A[c][s], qw[w_at(c)]);
          dA[c][s] = fmaf(decayed, d[c], dA[c][s]);
        }
      }
      if (t < kEarly) decay(a_bar[t], next_row, t);
#pragma unroll
      for (int k = 0; k < 4; ++k) parts[k] = qw[k];
      const float column[2] = {g == t % 4 * 2 ? 1.f : 0.f, g == t % 4 * 2 + 1 ? 1.f : 0.f};
      add_channels(dB, xdh, column, ones);
      add_channels(dC, dyh, column, ones);
      if (t % 4 > 0) continue;
      sums[0] = dB[0] + dB[2], sums[1] = dB[1] + dB[3];
      sums[2] = dC[0] + dC[2], sums[3] = dC[1] + dC[3];
    }
    put_sums(0, sums);
    store4(lane_at, Places::kPartsAt, parts[0], parts[1], parts[2], parts[3]);
  }
};

}  // namespace krait::cuda::scan_streams
