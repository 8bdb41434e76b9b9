// What a block of the scan's backward pass does with a tile. The states of a tile of 64 tokens are
// scanned once more from the state that the forward pass saved, and stay in registers for the way
// back.
//
// The lanes of a warp split a channel's tile: 8 runs of 8 tokens times 4 groups of 4 states. A lane
// scans its run from zero in both directions; 16 + 16 lanes chain the runs; then the lane knows
// both ends. So A_bar and h of 8 x 4 (token, state) pairs are all in registers, and dB and dC,
// which sum over channels, are sums in registers too while the warp goes from channel to channel.
#pragma once

#include "ops/selective_scan_bwd_args.cuh"

namespace krait::cuda::scan_bwd {

// One block at work on one unit of channels of one tile.
template <class T>
struct Block {
  static constexpr int kPitch = kScanBwdPitch;
  static constexpr int kQuads = kUnit / 4;

  const Args<T>& a;
  char* memory;
  ScanBwdShared at;
  int group, channel0, channels;  // of the block: first, and how many there are
  // The tile and the unit at hand.
  int t0, tokens, round, stage;
  bool many;  // segments in the sequence

  __device__ Block(const Args<T>& args, char* shared)
      : a(args),
        memory(shared),
        at(scan_bwd_shared(args.rounds, args.padded_states, args.stages, sizeof(T))) {
    group = static_cast<int>(blockIdx.x) / a.group_blocks;
    const int first = static_cast<int>(blockIdx.x) % a.group_blocks * a.rounds * kUnit;
    channel0 = group * a.group_channels + first;
    channels = min(a.rounds * kUnit, a.group_channels - first);
  }

  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(memory + offset); }
  __device__ T* tile(int stage_, int input) const {
    return reinterpret_cast<T*>(memory + at.tile) + (stage_ * 4 + input) * kTile * kPitch;
  }
  __device__ float* first_states(int stage_) const {
    return floats(at.first) + stage_ * kUnit * a.padded_states;
  }
  __device__ int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % 32; }
  __device__ int run() const { return lane() % kRuns; }
  __device__ int state() const { return lane() / kRuns * kLaneStates; }
  // Channel i of the warp's, counted within the block.
  __device__ int channel(int i) const { return round * kUnit + warp() * kWarpChannels + i; }
  __device__ float* quantity(int i, int which) const {
    return floats(at.tokens) + ((warp() * kWarpChannels + i) * kQuantities + which) * kTile;
  }
  __device__ int rounds() const { return (channels + kUnit - 1) / kUnit; }

  template <class F>
  __device__ void for_each_state(int count_channels, F f) const {
    for (int i = static_cast<int>(threadIdx.x); i < count_channels * a.padded_states;
         i += kScanBwdThreads)
      f(i, i / a.padded_states, i % a.padded_states);
  }

  // Four channels of two rows: a thread's share of moving a tile.
  template <class F>
  __device__ void for_own_quads(int count, int width, F f) const {
    const int row = static_cast<int>(threadIdx.x) / kQuads,
              column = static_cast<int>(threadIdx.x) % kQuads * 4;
#pragma unroll
    for (int k = 0; k < kTile * kQuads / kScanBwdThreads; ++k) {
      const int r = row + k * (kScanBwdThreads / kQuads);
      if (r < count && column < width) f(r, column);
    }
  }
  __device__ void fetch_input(int stage_, int input, const T* x, int64_t row_stride, int t,
                              int count, int first) const {
    const int width = min(kUnit, channels - first);
    const T* from = x + int64_t{t} * row_stride + channel0 + first;
    T* to = tile(stage_, input);
    if (a.vector_rows) {
      for_own_quads(count, width, [&](int row, int column) {
        copy_async<4 * sizeof(T)>(to + row * kPitch + column, from + row * row_stride + column);
      });
    } else {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < count * kUnit; i += kScanBwdThreads) {
        const int row = i / kUnit, column = i % kUnit;
        if (column < width) to[row * kPitch + column] = from[row * row_stride + column];
      }
    }
  }

  // Starts to fetch u, dt, z, dy and the states before the tile of one unit.
  __device__ void fetch(const Piece& p, int stage_, int t, int round_) const {
    const int count = min(kTile, p.end - t), first = round_ * kUnit;
    fetch_input(stage_, kDt, a.dt, a.dt_row, t, count, first);
    fetch_input(stage_, kU, a.u, a.u_row, t, count, first);
    fetch_input(stage_, kGradY, a.dy, a.dy_row, t, count, first);
    if (a.z) fetch_input(stage_, kZ, a.z, a.z_row, t, count, first);
    const int64_t plane = int64_t{a.d_inner} * a.d_state;
    const float* from = t > p.seq_begin ? a.saved + (t / kTile - 1) * plane
                        : a.state       ? a.state + p.state_row * plane
                                        : nullptr;
    if (from) from += int64_t{channel0 + first} * a.d_state;
    float* to = first_states(stage_);
    const int width = min(kUnit, channels - first);
    if (round_ == 0 && a.padded_states == kBlockStates && a.vector_bc) fetch_bc(stage_, t, count);
    if (a.vector_states && from) {
      for (int i = static_cast<int>(threadIdx.x); i < width * a.d_state / 4; i += kScanBwdThreads)
        copy_async<16>(to + i * 4, from + i * 4);
    } else {
      for_each_state(kUnit, [&](int i, int c, int n) {
        to[i] = from && c < width && n < a.d_state ? from[c * a.d_state + n] : 0.f;
      });
    }
    copies_commit();
  }

  // B and C lie as (token of the run, state / 4, run, state % 4): quad i holds four states of token
  // bc_token(i).
  static __device__ int bc_token(int i) { return i % kRuns * kRunTokens + i / 32; }
  static __device__ int bc_state(int i) { return i / kRuns % 4 * 4; }
  __device__ T* fetched_bc(int stage_, int which, int i) const {
    return reinterpret_cast<T*>(memory + at.fetched_bc) + (stage_ * 2 + which) * kTileStates +
           i * 4;
  }
  __device__ void fetch_bc(int stage_, int t, int count) const {
#pragma unroll
    for (int k = 0; k < kTileStates / 4 / kScanBwdThreads; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kScanBwdThreads, row = bc_token(i);
      const bool read = row < count && bc_state(i) < a.d_state;
      const int64_t at_row = t + (read ? row : 0);
      const int n = read ? bc_state(i) : 0;
      copy_async<4 * sizeof(T)>(fetched_bc(stage_, 0, i),
                                a.B + at_row * a.B_row + group * a.B_group + n, read);
      copy_async<4 * sizeof(T)>(fetched_bc(stage_, 1, i),
                                a.C + at_row * a.C_row + group * a.C_group + n, read);
    }
  }
  // What this thread has fetched, as f32.
  __device__ void unpack_bc(int stage_) const {
#pragma unroll
    for (int k = 0; k < kTileStates / 4 / kScanBwdThreads; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kScanBwdThreads;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const Floats<4> x = load_vector<4>(fetched_bc(stage_, which, i));
        store4(floats(at.bc) + which * kTileStates + i * 4, x[0], x[1], x[2], x[3]);
      }
    }
  }
  __device__ void load_bc(int block_state) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kTileStates / 4; i += kScanBwdThreads) {
      const int t = bc_token(i), n = block_state + bc_state(i);
      float* to = floats(at.bc) + i * 4;
      load_four(to, a.B + int64_t{t0 + t} * a.B_row + group * a.B_group, n, t);
      load_four(to + kTileStates, a.C + int64_t{t0 + t} * a.C_row + group * a.C_group, n, t);
    }
  }
  __device__ void load_four(float* to, const T* from, int n, int t) const {
    Floats<4> x = constant<4>(0);
    if (t < tokens && a.vector_bc) {
      if (n < a.d_state) x = load_vector<4>(from + n);
    } else if (t < tokens) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (n + i < a.d_state) x[i] = load_vector<1>(from + n + i)[0];
    }
    store4(to, x[0], x[1], x[2], x[3]);
  }

  // A lane's two tokens (k = 0, 1) of the tile, and its place for both in the arrays of 64 tokens.
  // Which of a run's halves: such that lanes read the tile's rows without more than two bank
  // conflicts.
  __device__ int own_run() const { return lane() / 2 % kRuns; }
  __device__ int own_in_run() const {
    return ((lane() / 16 + own_run() / 2) % 2) * 4 + lane() % 2 * 2;
  }
  __device__ int own_place() const { return place_of(own_run(), own_in_run()); }
  __device__ int own_token(int k) const { return own_run() * kRunTokens + own_in_run() + k; }
  __device__ Floats<4> own(int input, int k) const {
    return load_vector<4>(tile(stage, input) + own_token(k) * kPitch + warp() * kWarpChannels);
  }
  // dt_bias (0) or D (1) of the warp's channels.
  __device__ Floats<4> constants(int which) const {
    return load_vector<4>(floats(at.constants) + which * a.rounds * kUnit + channel(0));
  }

  // delta, delta u and dy silu(z) of the warp's channels; zero where there is no token or channel,
  // which leaves states and gradients as they are.
  __device__ void prepare() const {
    float v[kWarpChannels][3][2];
    const Floats<4> bias = constants(0);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const Floats<4> dt = own(kDt, k), u = own(kU, k), dy = own(kGradY, k);
      const Floats<4> z = a.z ? own(kZ, k) : constant<4>(0);
#pragma unroll
      for (int i = 0; i < kWarpChannels; ++i) {
        const bool valid = own_token(k) < tokens && channel(i) < channels;
        const float delta = softplus(dt[i] + bias[i]);
        v[i][0][k] = valid ? delta : 0.f;
        v[i][1][k] = valid ? delta * u[i] : 0.f;
        v[i][2][k] = valid ? (a.z ? dy[i] * silu(z[i]) : dy[i]) : 0.f;
      }
    }
#pragma unroll
    for (int i = 0; i < kWarpChannels; ++i) {
#pragma unroll
      for (int q = 0; q < 3; ++q)
        *reinterpret_cast<float2*>(quantity(i, q) + own_place()) =
            make_float2(v[i][q][0], v[i][q][1]);
    }
    if (!many) return;
    float sum[kWarpChannels];
#pragma unroll
    for (int i = 0; i < kWarpChannels; ++i) sum[i] = v[i][0][0] + v[i][0][1];
    fold<4>(sum, 16);
    fold<2>(sum, 8);
    float s = sum[0];
    s += __shfl_xor_sync(~0u, s, 4);
    s += __shfl_xor_sync(~0u, s, 2);
    s += __shfl_xor_sync(~0u, s, 1);
    if (lane() % 8 == 0)
      floats(at.sums)[2 * a.rounds * kUnit + channel(lane() / 16 * 2 + lane() / 8 % 2)] += s;
  }

  __device__ void load_half(float (&x)[4], const float* from, int half) const {
    const float4 v = load4(from + place_of(run(), half * 4));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
  __device__ void load_C(float (&C)[kRunTokens][4]) const {
#pragma unroll
    for (int j = 0; j < kRunTokens; ++j) {
      const float4 v = load4(bc_of(1, j));
      C[j][0] = v.x, C[j][1] = v.y, C[j][2] = v.z, C[j][3] = v.w;
    }
  }
  // Eight values of a run of the quantity.
  __device__ void load_run(float (&x)[kRunTokens], const float* from) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 v = load4(from + place_of(run(), half * 4));
      x[half * 4] = v.x, x[half * 4 + 1] = v.y, x[half * 4 + 2] = v.z, x[half * 4 + 3] = v.w;
    }
  }
  __device__ const float* bc_of(int which, int j) const {
    return floats(at.bc) + which * kTileStates + (j * 32 + lane()) * 4;
  }

  // Chains the runs: from `h` and `g`, which a run makes of zero, and its decay P, to the state
  // before the run and the gradient that flows into it from behind. Lanes 0-15 go forward, a state
  // each; lanes 16-31 back.
  __device__ void chain_runs(float (&h)[4], float (&g)[4], const float (&P)[4], int i,
                             int block_state) const {
    constexpr int kRow = 36;  // floats; a row for each step: 16 forward, 16 back
    float* ends = floats(at.exchange) + warp() * kTileStates;
    float* decays = ends + kRuns * kRow;
    const int forward = run() * kRow + state(), back = (kRuns - 1 - run()) * kRow + 16 + state();
    store4(ends + forward, h[0], h[1], h[2], h[3]);
    store4(ends + back, g[0], g[1], g[2], g[3]);
    store4(decays + forward, P[0], P[1], P[2], P[3]);
    store4(decays + back, P[0], P[1], P[2], P[3]);
    __syncwarp();
    const int n = block_state + lane() % 16;
    const int c = channel(i) * a.padded_states + n;
    const bool is_back = lane() >= 16;
    float* begin = is_back
                       ? floats(at.carry) + c
                       : first_states(stage) + (warp() * kWarpChannels + i) * a.padded_states + n;
    float x = *begin, end[kRuns], decay[kRuns];
#pragma unroll
    for (int k = 0; k < kRuns; ++k)
      end[k] = ends[k * kRow + lane()], decay[k] = decays[k * kRow + lane()];
#pragma unroll
    for (int k = 0; k < kRuns; ++k) {
      ends[k * kRow + lane()] = x;
      x = fmaf(decay[k], x, end[k]);
    }
    if (many && is_back) {
      float zero = floats(at.zero)[c];
#pragma unroll
      for (int k = 0; k < kRuns; ++k) zero = fmaf(decay[k], zero, end[k]);
      floats(at.zero)[c] = zero;
    }
    if (is_back) *begin = x;
    __syncwarp();
    const float4 h4 = load4(ends + forward), g4 = load4(ends + back);
    h[0] = h4.x, h[1] = h4.y, h[2] = h4.z, h[3] = h4.w;
    g[0] = g4.x, g[1] = g4.y, g[2] = g4.z, g[3] = g4.w;
  }

  // Both scans of a run from zero; A_bar and delta B u stay.
  __device__ void scan_run(float (&a_bar)[kRunTokens][4], float (&x)[kRunTokens][4], float (&h)[4],
                           float (&g)[4], float (&P)[4], const float4& A4,
                           const float (&C)[kRunTokens][4], int i) const {
    const float A[4] = {A4.x, A4.y, A4.z, A4.w};
    float delta[kRunTokens], du[kRunTokens], dy[kRunTokens], sum = 0;
    load_run(delta, quantity(i, kDelta));
    load_run(du, quantity(i, kDeltaU));
#pragma unroll
    for (int s = 0; s < 4; ++s) g[s] = 0;
#pragma unroll
    for (int j = 0; j < kRunTokens; ++j) {
      const float4 B4 = load4(bc_of(0, j));
      const float B[4] = {B4.x, B4.y, B4.z, B4.w};
      sum += delta[j];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        a_bar[j][s] = exp2_approx(delta[j] * A[s]);
        x[j][s] = du[j] * B[s];
        h[s] = j == 0 ? x[j][s] : fmaf(a_bar[j][s], h[s], x[j][s]);
      }
    }
    load_run(dy, quantity(i, kDy));
#pragma unroll
    for (int j = kRunTokens - 1; j >= 0; --j) {
#pragma unroll
      for (int s = 0; s < 4; ++s) g[s] = fmaf(dy[j], C[j][s], g[s]) * a_bar[j][s];
    }
#pragma unroll
    for (int s = 0; s < 4; ++s) P[s] = exp2_approx(sum * A[s]);
  }

  // One channel, one block of states: adds to dB, dC and dA, and leaves y, q and w in the arrays of
  // tokens (q = sum of dh B; w = sum of dh A_bar h A log2(e)).
  __device__ void channel_gradients(float (&dB)[kRunTokens][4], float (&dC)[kRunTokens][4],
                                    const float (&C)[kRunTokens][4], int i, int block_state) const {
    const int row = channel(i) * a.padded_states + block_state;
    const float4 A4 = load4(floats(at.A) + row + state());
    float a_bar[kRunTokens][4], h[kRunTokens][4], before[4], g[4], dA[4] = {};
    {
      float P[4];
      scan_run(a_bar, h, before, g, P, A4, C, i);
      chain_runs(before, g, P, i, block_state);
    }
#pragma unroll
    for (int j = 0; j < kRunTokens; ++j)
#pragma unroll
      for (int s = 0; s < 4; ++s)
        h[j][s] = fmaf(a_bar[j][s], j == 0 ? before[s] : h[j - 1][s], h[j][s]);
    const float A[4] = {A4.x, A4.y, A4.z, A4.w};
    __syncwarp();  // the chains have been read
#pragma unroll
    for (int half = 1; half >= 0; --half) {
      float delta[4], du[4], dy[4], y[4], q[4], w[4];
      load_half(delta, quantity(i, kDelta), half);
      load_half(du, quantity(i, kDeltaU), half);
      load_half(dy, quantity(i, kDy), half);
#pragma unroll
      for (int k = 3; k >= 0; --k) {
        const int j = half * 4 + k;
        const float4 B4 = load4(bc_of(0, j));
        const float B[4] = {B4.x, B4.y, B4.z, B4.w};
        y[k] = q[k] = w[k] = 0;
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const float dh = fmaf(dy[k], C[j][s], g[s]);
          y[k] = fmaf(C[j][s], h[j][s], y[k]);
          dC[j][s] = fmaf(dy[k], h[j][s], dC[j][s]);
          dB[j][s] = fmaf(dh, du[k], dB[j][s]);
          q[k] = fmaf(dh, B[s], q[k]);
          g[s] = dh * a_bar[j][s];
          const float through = g[s] * (j == 0 ? before[s] : h[j - 1][s]);
          w[k] = fmaf(through, A[s], w[k]);
          dA[s] = fmaf(through, delta[k], dA[s]);
        }
      }
      float* to = floats(at.exchange) + warp() * kTileStates + state() / 4 * kTile +
                  place_of(run(), half * 4);
      store4(to, y[0], y[1], y[2], y[3]);
      store4(to + 4 * kTile, q[0], q[1], q[2], q[3]);
      store4(to + 8 * kTile, w[0], w[1], w[2], w[3]);
    }
    add_over_states(i, block_state > 0);
    if (a.padded_states == kBlockStates) {
      float* sums = floats(at.dA) + (channel(i) * 32 + lane()) * 4;
      const float4 sum = load4(sums);
      store4(sums, sum.x + dA[0], sum.y + dA[1], sum.z + dA[2], sum.w + dA[3]);
      return;
    }
    fold<4>(dA, 1);
    fold<2>(dA, 2);
    dA[0] += __shfl_xor_sync(~0u, dA[0], 4);
    if (lane() % 8 < 4) floats(at.dA)[row + state() + lane() % 2 * 2 + lane() / 2 % 2] += dA[0];
  }

  // Sums over the four groups of states, by way of shared memory: every lane adds its two tokens'.
  __device__ void add_over_states(int i, bool add) const {
    const float* parts = floats(at.exchange) + warp() * kTileStates;
    __syncwarp();
    float2 part[3][4];
#pragma unroll
    for (int which = 0; which < 3; ++which)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        part[which][k] =
            *reinterpret_cast<const float2*>(parts + (which * 4 + k) * kTile + own_place());
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      float2* to = reinterpret_cast<float2*>(quantity(i, kY + which) + own_place());
      float2 sum = part[which][0];
#pragma unroll
      for (int k = 1; k < 4; ++k) sum.x += part[which][k].x, sum.y += part[which][k].y;
      if (add) {
        const float2 before = *to;
        sum.x += before.x, sum.y += before.y;
      }
      *to = sum;
    }
    __syncwarp();  // the parts have been read
  }

  // From the sums over states to the gradients of the warp's channels, in place of the inputs.
  __device__ void finish() const {
    float sums[2 * kWarpChannels] = {};  // dD, then ddt_bias
    float v[kWarpChannels][4][2];
#pragma unroll
    for (int i = 0; i < kWarpChannels; ++i)
#pragma unroll
      for (int which = 0; which < 4; ++which) {
        const float2 x = *reinterpret_cast<const float2*>(
            quantity(i, which == 0 ? kDelta : kY + which - 1) + own_place());
        v[i][which][0] = x.x, v[i][which][1] = x.y;
      }
    const Floats<4> bias = constants(0), D = constants(1);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const bool valid = own_token(k) < tokens;
      const Floats<4> dt = own(kDt, k), u = own(kU, k), dy_in = own(kGradY, k);
      const Floats<4> z = a.z ? own(kZ, k) : constant<4>(0);
      Floats<4> ddt, du, y, dz;
#pragma unroll
      for (int i = 0; i < kWarpChannels; ++i) {
        const float delta = v[i][0][k], q = v[i][2][k], w = v[i][3][k];
        const float sig_z = a.z ? sigmoid(z[i]) : 1.f, gate = a.z ? z[i] * sig_z : 1.f;
        const float dy = dy_in[i] * gate, raw_y = fmaf(D[i], u[i], v[i][1][k]);
        du[i] = fmaf(D[i], dy, delta * q);
        ddt[i] = fmaf(kLn2, w, u[i] * q) * sigmoid(dt[i] + bias[i]);
        y[i] = raw_y * gate;
        dz[i] = dy_in[i] * raw_y * (sig_z * fmaf(z[i], 1.f - sig_z, 1.f));
        if (valid) sums[i] = fmaf(dy, u[i], sums[i]), sums[kWarpChannels + i] += ddt[i];
      }
      const int to = own_token(k) * kPitch + warp() * kWarpChannels;
      store_vector(tile(stage, kDt) + to, ddt);
      store_vector(tile(stage, kU) + to, du);
      store_vector(tile(stage, kGradY) + to, y);
      if (a.z) store_vector(tile(stage, kZ) + to, dz);
    }
    fold<8>(sums, 16);
    fold<4>(sums, 8);
    fold<2>(sums, 4);
    float s = sums[0];
    s += __shfl_xor_sync(~0u, s, 2);
    s += __shfl_xor_sync(~0u, s, 1);
    if (lane() % 4 == 0)
      floats(
          at.sums)[lane() / 16 * a.rounds * kUnit + channel(lane() / 8 % 2 * 2 + lane() / 4 % 2)] +=
          s;
  }

  __device__ void store_output(int input, T* x, int64_t row_stride) const {
    const int first = round * kUnit, width = min(kUnit, channels - first);
    T* to = x + int64_t{t0} * row_stride + channel0 + first;
    const T* from = tile(stage, input);
    if (a.vector_rows) {
      for_own_quads(tokens, width, [&](int row, int column) {
        const Packed<T, 4> x = load_packed<4>(from + row * kPitch + column);
        store_packed(to + row * row_stride + column, x);
      });
    } else {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < tokens * kUnit; i += kScanBwdThreads) {
        const int row = i / kUnit, column = i % kUnit;
        if (column < width) to[row * row_stride + column] = from[row * kPitch + column];
      }
    }
  }
  __device__ void store_outputs() const {
    store_output(kDt, a.ddt, a.ddt_row);
    store_output(kU, a.du, a.du_row);
    if (a.y) store_output(kGradY, a.y, a.y_row);
    if (a.dz) store_output(kZ, a.dz, a.dz_row);
  }

  // A warp's dB or dC of a unit, for add_parts.
  __device__ void put_part(float* parts, const float (&x)[kRunTokens][4]) const {
#pragma unroll
    for (int j = 0; j < kRunTokens; ++j)
      store4(parts + warp() * kTileStates + (j * 32 + lane()) * 4, x[j][0], x[j][1], x[j][2],
             x[j][3]);
  }
  // Sums dB (which = 0) or dC over the warps, then over the block's units; the last one's go to
  // memory.
  __device__ void add_parts(const float* parts, int which, int block_state) const {
    float* out = (which == 0 ? a.dB : a.dC) + (blockIdx.x * a.tokens + t0) * a.d_state;
#pragma unroll
    for (int k = 0; k < kTileStates / 4 / kScanBwdThreads; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kScanBwdThreads;
      float4 sum = load4(parts + i * 4);
#pragma unroll
      for (int w = 1; w < kScanBwdWarps; ++w) {
        const float4 v = load4(parts + w * kTileStates + i * 4);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      float* before = floats(at.bc_sums) + which * kTileStates + i * 4;
      if (round > 0) {
        const float4 v = load4(before);
        sum.x = v.x + sum.x, sum.y = v.y + sum.y, sum.z = v.z + sum.z, sum.w = v.w + sum.w;
      }
      if (round + 1 < rounds()) {
        store4(before, sum.x, sum.y, sum.z, sum.w);
        continue;
      }
      const int t = bc_token(i), n = block_state + bc_state(i);
      if (t >= tokens || n >= a.d_state) continue;
      float* to = out + t * a.d_state + n;
      if (a.d_state % 4 == 0) {
        store4(to, sum.x, sum.y, sum.z, sum.w);
      } else {
        const float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int s = 0; s < 4; ++s)
          if (n + s < a.d_state) to[s] = v[s];
      }
    }
  }

  // A unit of the tile with one block of states.
  __device__ void unit_of_one_block() const {
    __syncwarp();  // delta, delta u, dy are there
    float dB[kRunTokens][4] = {}, dC[kRunTokens][4] = {}, C[kRunTokens][4];
    load_C(C);
#pragma unroll 1
    for (int i = 0; i < kWarpChannels; ++i) channel_gradients(dB, dC, C, i, 0);
    __syncwarp();  // the sums over states are there
    finish();
    float* parts = floats(at.tokens);
    __syncthreads();  // outputs are there, the arrays of tokens and the exchange memory are free
    put_part(parts, dB);
    put_part(parts + kScanBwdWarps * kTileStates, dC);
    store_outputs();
    __syncthreads();  // every warp's part is there
    add_parts(parts, 0, 0);
    add_parts(parts + kScanBwdWarps * kTileStates, 1, 0);
  }
  __device__ void unit_of_many_blocks() const {
    for (int block_state = 0; block_state < a.padded_states; block_state += kBlockStates) {
      __syncthreads();  // B and C are no longer in use
      load_bc(block_state);
      __syncthreads();  // B and C are there
      float dB[kRunTokens][4] = {}, dC[kRunTokens][4] = {}, C[kRunTokens][4];
      load_C(C);
#pragma unroll 1
      for (int i = 0; i < kWarpChannels; ++i) channel_gradients(dB, dC, C, i, block_state);
      float* parts = floats(at.exchange);
      __syncthreads();  // the exchange memory is free
      put_part(parts, dB);
      __syncthreads();  // every warp's part is there
      add_parts(parts, 0, block_state);
      __syncthreads();  // the parts have been read
      put_part(parts, dC);
      __syncthreads();  // every warp's part is there
      add_parts(parts, 1, block_state);
    }
    finish();
    __syncthreads();  // outputs are there
    store_outputs();
  }
  __device__ void unit_gradients() const {
    prepare();
    if (a.padded_states == kBlockStates)
      unit_of_one_block();
    else
      unit_of_many_blocks();
  }

  // What flows back through the tile of a unit, and nothing else.
  __device__ void unit_carry() const {
    prepare();
    for (int block_state = 0; block_state < a.padded_states; block_state += kBlockStates) {
      if (a.padded_states > kBlockStates) {
        __syncthreads();  // B and C are no longer in use
        load_bc(block_state);
        __syncthreads();  // B and C are there
      } else {
        __syncwarp();  // delta, delta u, dy are there
      }
      float C[kRunTokens][4];
      load_C(C);
#pragma unroll 1
      for (int i = 0; i < kWarpChannels; ++i) {
        const float4 A4 =
            load4(floats(at.A) + channel(i) * a.padded_states + block_state + state());
        float a_bar[kRunTokens][4], x[kRunTokens][4], h[4], g[4], P[4];
        scan_run(a_bar, x, h, g, P, A4, C, i);
        chain_runs(h, g, P, i, block_state);
        __syncwarp();  // the chains have been read
      }
    }
  }

  // Before a piece: what flows into it from behind.
  __device__ void begin_piece(const Piece& p, bool carry_only) const {
    const float* from = nullptr;
    const int64_t plane = int64_t{a.d_inner} * a.d_state;
    if (a.cut && p.many && !carry_only)
      from = a.behind + p.segment_slot * plane;
    else if (a.dstate && !carry_only)
      from = a.dstate + p.state_row * plane;
    for_each_state(a.rounds * kUnit, [&](int i, int c, int n) {
      const float x =
          from && c < channels && n < a.d_state ? from[int64_t{channel0 + c} * a.d_state + n] : 0.f;
      floats(at.carry)[i] = floats(at.behind)[i] = x;
      floats(at.zero)[i] = 0;
    });
    clear_delta_sums();
  }
  __device__ void clear_delta_sums() const {
    for (int i = static_cast<int>(threadIdx.x); i < a.rounds * kUnit; i += kScanBwdThreads)
      floats(at.sums)[2 * a.rounds * kUnit + i] = 0;
  }

  // Where a segment begins within a sequence that is walked as a whole.
  __device__ void next_segment() const {
    __syncthreads();  // the segment's sums are there
    for_each_state(a.rounds * kUnit, [&](int i, int c, int) {
      const float sum = floats(at.sums)[2 * a.rounds * kUnit + c];
      const float x =
          fmaf(exp2_approx(floats(at.A)[i] * sum), floats(at.behind)[i], floats(at.zero)[i]);
      floats(at.carry)[i] = floats(at.behind)[i] = x;
      floats(at.zero)[i] = 0;
    });
    __syncthreads();  // the sums have been read
    clear_delta_sums();
  }

  __device__ void end_piece(const Piece& p, bool carry_only) const {
    __syncthreads();  // the last tile's carry is there
    float* to = carry_only            ? a.behind + p.segment_slot * a.d_inner * a.d_state
                : a.dstate && p.first ? a.dstate + p.state_row * a.d_inner * a.d_state
                                      : nullptr;
    if (to)
      for_each_state(channels, [&](int i, int c, int n) {
        if (n < a.d_state)
          to[int64_t{channel0 + c} * a.d_state + n] = floats(carry_only ? at.zero : at.carry)[i];
      });
    if (carry_only)
      for (int c = static_cast<int>(threadIdx.x); c < channels; c += kScanBwdThreads)
        a.delta_sums[p.segment_slot * a.d_inner + channel0 + c] =
            floats(at.sums)[2 * a.rounds * kUnit + c];
    __syncthreads();  // carry and sums have been read
  }

  __device__ void begin() const {
    for_each_state(a.rounds * kUnit, [&](int i, int c, int n) {
      const bool exists = c < channels && n < a.d_state;
      floats(at.A)[i] = exists ? a.A[int64_t{channel0 + c} * a.d_state + n] * kLog2E : 0.f;
    });
    const int all = a.rounds * kUnit;
    for (int i = static_cast<int>(threadIdx.x); i < all * scan_bwd_dA_width(a.padded_states);
         i += kScanBwdThreads)
      floats(at.dA)[i] = 0;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * all; i += kScanBwdThreads) {
      const float* from = i < all ? a.dt_bias : a.D;
      floats(at.constants)[i] = from && i % all < channels ? from[channel0 + i % all] : 0.f;
      floats(at.sums)[i] = 0;
    }
    // Padded states stay zero, whatever is fetched beside them.
    for_each_state(a.stages * kUnit, [&](int i, int, int) { floats(at.first)[i] = 0; });
    __syncthreads();  // before what is fetched
  }
  __device__ float sum_dA(int i, int c, int n) const {
    if (a.padded_states > kBlockStates) return floats(at.dA)[i];
    const float* lanes = floats(at.dA) + (c * 32 + n / 4 * kRuns) * 4 + n % 4;
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) sum += lanes[r * 4];
    return sum;
  }
  __device__ void end() const {
    __syncthreads();  // the sums are there
    for_each_state(channels, [&](int i, int c, int n) {
      if (n < a.d_state)
        a.dA[(int64_t{blockIdx.y} * a.d_inner + channel0 + c) * a.d_state + n] = sum_dA(i, c, n);
    });
    for (int c = static_cast<int>(threadIdx.x); c < channels; c += kScanBwdThreads)
      for (int k = 0; k < 2; ++k)
        a.dD_dbias[(int64_t{blockIdx.y} * 2 + k) * a.d_inner + channel0 + c] =
            floats(at.sums)[k * a.rounds * kUnit + c];
  }
};

}  // namespace krait::cuda::scan_bwd
