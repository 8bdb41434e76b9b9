// What a block of the streams' backward pass does where channels have 16 states for each of its
// warps, which share 16 channels: see selective_scan_bwd_streams_cuda.cu.
#pragma once

#include <cstddef>

#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/mbarrier.cuh"
#include "ops/selective_scan_bwd_streams_warp.cuh"

namespace krait::cuda::scan_streams {

template <int kWarps>
struct WidePlaces {
  using Memory = WideShared<kWarps>;
  static constexpr int kStates = Memory::kStates;
  static constexpr bool kPartsByChannel = true;
  static constexpr int kDyAt = (offsetof(Memory, dy) - offsetof(Memory, rows)) / 4,
                       kStatesAt = offsetof(typename Memory::Warp, states) / 4,
                       kPartsAt = offsetof(typename Memory::Warp, parts) / 4;
  static constexpr uint32_t kIdentity = offsetof(Memory, identity);
};

template <int kWarps>
struct WideBlock : WarpScan<WidePlaces<kWarps>> {
  using SharedMemory = WideShared<kWarps>;
  using Warp = typename SharedMemory::Warp;
  using Scan = WarpScan<WidePlaces<kWarps>>;
  using Scan::a, Scan::g, Scan::q, Scan::channel, Scan::state_at, Scan::block_at, Scan::pair_at,
      Scan::dy_at, Scan::lane_at, Scan::bc_at, Scan::carry, Scan::dA, Scan::kStates, Scan::run_rows,
      Scan::load_states, Scan::store_states, Scan::before_tile;
  using typename Scan::Run;
  static constexpr int kThreads = SharedMemory::kThreads, kOwn = SharedMemory::kOwn,
                       kOwners = SharedMemory::kOwners;
  static constexpr uint32_t kGroups = kScanStreamsChannels / kOwn;  // owners of a token
  SharedMemory& sh;
  uint32_t runs = 0;  // that the block is done with

  __device__ __forceinline__ WideBlock(const Args& args, SharedMemory& shared)
      : Scan(args), sh(shared) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    g = lane / 4, q = lane % 4;
    channel = first_channel() + g * 2;
    state_at = int64_t{channel} * kStates + warp * kWarpStates + q * 4;
    pair_at = pinned_address(&sh.rows[0][g * 4]), dy_at = shared_address(&sh.rows[0][g * 2]);
    lane_at = pinned_address(&sh.warp[warp].states[0][0][lane * 4]);
    bc_at = pinned_address(&sh.bc[0][warp * kWarpStates + q * 4]);
    block_at = pinned_address(&sh);
    if (thread < 32) {
      Scan::put_identity(sh.identity);
      const float* from = lane < kScanStreamsChannels ? a.D : a.dt_bias;
      sh.constants[lane / kScanStreamsChannels][lane % kScanStreamsChannels] =
          from ? from[first_channel() + lane % kScanStreamsChannels] : 0.f;
    }
    sh.partial[thread] = a.dB + (blockIdx.x * a.tokens + q) * sums_row(kStates) +
                         warp * kWarpStates + g % 4 * 4 + g / 4 * 2;
    if (owns())
      for (int c = 0; c < 2 * kOwn; ++c) sh.sums[thread][c] = 0;
    if (thread == 0) init_mbarrier(shared_address(&sh.finished), kWarps);
    __syncthreads();  // the barrier is there
    arrive_finished();
    Scan::zero(dA);
    Scan::load_A();
  }

  static __device__ __forceinline__ int first_channel() {
    return static_cast<int>(blockIdx.x) * kScanStreamsChannels;
  }
  static __device__ __forceinline__ bool owns() {
    return kThreads <= kOwners || threadIdx.x < kOwners;
  }

  // The token of a run and the first of its channels that a thread owns.
  struct Owner {
    uint32_t thread, token, first;
    __device__ __forceinline__ Owner()
        : thread(this_thread()), token(thread / kGroups), first(thread % kGroups * kOwn) {}
  };
  static __device__ __forceinline__ void load(float (&v)[kOwn], const float& from) {
    if constexpr (kOwn == 2)
      load2(v, shared_address(&from));
    else
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v[0]) : "r"(shared_address(&from)));
  }
  static __device__ __forceinline__ void store(float& to, const float (&v)[kOwn]) {
    if constexpr (kOwn == 2)
      store2(shared_address(&to), 0, v[0], v[1]);
    else
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared_address(&to)), "f"(v[0]));
  }

  // h before the tile, and into shared memory its B and C, zero where there is no token.
  __device__ __forceinline__ void load_tile(float (&h)[2][4], const Piece& p, int t0,
                                            int tokens) const {
    constexpr uint32_t kQuads = 2 * kStates / 4, kStep = kThreads / kQuads;
    constexpr int kSteps = kTile / kStep;
    const uint32_t first = this_thread() / kQuads, at = this_thread() % kQuads * 4;
    const int group = first_channel() / a.group_channels;
    const bool is_B = at < kStates;
    const bf16* from = (is_B ? a.B + group * a.B_group : a.C + group * a.C_group - kStates) + at;
    const uint32_t row = is_B ? a.B_row : a.C_row;
    Packed<bf16, 4> x[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int t = static_cast<int>(first + k * kStep);
      x[k] = {};
      if (t < tokens) x[k] = load_packed<4>(row_of(from, t0 + t, row));
    }
    load_states(h, before_tile(p, t0));
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const Floats<4> f = unpack(x[k]);
      store4(shared_address(&sh.bc[first + k * kStep][at]), 0, f[0], f[1], f[2], f[3]);
    }
  }

  using Own = Packed<bf16, kOwn>;
  struct Inputs {
    Own u, dt, z, dy;
  };
  // Without a branch, as store_if.
  __device__ __forceinline__ Own load_own(const Owner& o, const bf16* from, uint32_t row, int token,
                                          bool there) const {
    from = row_of(from + first_channel() + o.first, token, row);
    Own x;
    if constexpr (kOwn == 2) {
      asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; mov.b32 %0, 0; @p ld.global.b32 %0, [%2];}"
                   : "=r"(x.word[0])
                   : "r"(static_cast<uint32_t>(there)), "l"(__cvta_generic_to_global(from)));
    } else {
      asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; mov.b32 %0, 0; @p ld.global.u16 %0, [%2];}"
                   : "=r"(x.word[0])
                   : "r"(static_cast<uint32_t>(there)), "l"(__cvta_generic_to_global(from)));
    }
    return x;
  }
  __device__ __forceinline__ Inputs load_inputs(const Owner& o, int token, bool there) const {
    return {load_own(o, a.u, a.u_row, token, there), load_own(o, a.dt, a.dt_row, token, there),
            load_own(o, a.z, a.z_row, token, there), load_own(o, a.dy, a.dy_row, token, there)};
  }

  // delta and delta u of a token of run j; zero if it is not there.
  __device__ __forceinline__ void put_row(const Owner& o, int j, const Own& u, const Own& dt,
                                          bool there) const {
    float bias[kOwn], delta[kOwn], delta_u[kOwn];
    load(bias, sh.constants[1][o.first]);
    const Floats<kOwn> us = unpack(u), dts = unpack(dt);
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      delta[c] = softplus(dts[c] + bias[c]);
      delta[c] = there ? delta[c] : 0.f;
      delta_u[c] = delta[c] * us[c];
    }
    float& row = own_row(o, j);
    store(row, delta), store((&row)[2], delta_u);
  }
  __device__ __forceinline__ float& own_row(const Owner& o, int j) const {
    return sh.rows[static_cast<uint32_t>(j) * kRun + o.token][o.first / 2 * 4 + o.first % 2];
  }
  // dy of the run that comes next, whose inputs rest in shared memory.
  __device__ __forceinline__ void put_inputs(const Owner& o, const Inputs& in) const {
    const Floats<kOwn> zs = unpack(in.z), dys = unpack(in.dy);
    float s[kOwn], dy[kOwn];
#pragma unroll
    for (int c = 0; c < kOwn; ++c) s[c] = sigmoid(zs[c]), dy[c] = dys[c] * (zs[c] * s[c]);
    store(sh.dy[o.token][o.first], dy);
    store(sh.gates[o.thread][0], s);
    store4(shared_address(&sh.inputs[o.thread]), 0, __uint_as_float(in.u.word[0]),
           __uint_as_float(in.dt.word[0]), __uint_as_float(in.z.word[0]),
           __uint_as_float(in.dy.word[0]));
  }
  __device__ __forceinline__ Inputs kept_inputs(const Owner& o) const {
    float v[4];
    load4(v, shared_address(&sh.inputs[o.thread]));
    return {{{__float_as_uint(v[0])}},
            {{__float_as_uint(v[1])}},
            {{__float_as_uint(v[2])}},
            {{__float_as_uint(v[3])}}};
  }

  // Rows of the tile from run j on.
  __device__ __forceinline__ void fetch_rows(const Owner& o, int t0, int end, int j) const {
    constexpr int kAhead = 4;  // runs whose loads are under way at once
#pragma unroll 1
    for (; j < kRuns && t0 + j * kRun < end; j += kAhead) {
      Own u[kAhead], dt[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int t = (j + k) * kRun + static_cast<int>(o.token);
        const bool there = t < kTile && t0 + t < end;
        u[k] = load_own(o, a.u, a.u_row, t0 + t, there);
        dt[k] = load_own(o, a.dt, a.dt_row, t0 + t, there);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (j + k >= kRuns) break;
        put_row(o, j + k, u[k], dt[k], t0 + (j + k) * kRun + static_cast<int>(o.token) < end);
      }
    }
  }

  // q, w and y over all states.
  __device__ __forceinline__ void add_parts(const Owner& o, float (&q_)[kOwn], float (&w)[kOwn],
                                            float (&y)[kOwn]) const {
    static_assert(offsetof(SharedMemory, warp) % 64 == 0 && sizeof(Warp) % 64 == 0 &&
                  offsetof(Warp, parts) % 64 == 0);  // bits 4 and 5 are the quad of states
    // In an order that has no bank conflicts.
    const uint32_t first = shared_address(&sh.warp[0].parts[o.token][o.first / 2 * 16]) +
                           o.first / 4 % 4 * 16 + o.first % 2 * 8;
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        float v[2 * kOwn];
        const uint32_t from = first ^ static_cast<uint32_t>(k * 16);
        const int at = warp * static_cast<int>(sizeof(Warp) / 4);
        if constexpr (kOwn == 2)
          load4(v, from, at);
        else
          load2(v, from, at);
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          q_[c] = k + warp == 0 ? v[2 * c] : q_[c] + v[2 * c];
          w[c] = k + warp == 0 ? v[2 * c + 1] : w[c] + v[2 * c + 1];
        }
      }
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      float v[kOwn];
      load(v, sh.warp[warp].y[(o.first / 2 * 4 + o.token / 2) * 4 + o.token % 2 * 2 + o.first % 2]);
#pragma unroll
      for (int c = 0; c < kOwn; ++c) y[c] = warp == 0 ? v[c] : y[c] + v[c];
    }
  }

  // What is on its way from global memory while a run is being walked.
  struct Ahead {
    Inputs in;  // of the run before it
    Own u, dt;  // of the run 64 tokens before it, whose rows take its rows' place
  };
  // Of the run whose token the thread owns is that.
  __device__ __forceinline__ void load_run(const Owner& o, Ahead& ahead, const Piece& p,
                                           int token) const {
    ahead.in = load_inputs(o, token - kRun, token - kRun >= p.begin);
    ahead.u = load_own(o, a.u, a.u_row, token - kTile, token - kTile >= p.begin);
    ahead.dt = load_own(o, a.dt, a.dt_row, token - kTile, token - kTile >= p.begin);
  }
  // Brings the states before a tile into the L2 cache, 32 bytes a thread.
  __device__ __forceinline__ void prefetch_states(const Piece& p, int t0) const {
    static_assert(kThreads * 8 == kScanStreamsChannels * kStates);
    const float* from = before_tile(p, t0);
    if (from)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from + int64_t{first_channel()} * kStates +
                                                    this_thread() * 8));
  }

  __device__ __forceinline__ void store_if(bool there, bf16* to, uint32_t row, int token,
                                           const Owner& o, const float (&v)[kOwn]) const {
    Floats<kOwn> x;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) x[c] = v[c];
    to = row_of(to + first_channel() + o.first, token, row);
    if constexpr (kOwn == 2)
      store_pair_if(there, to, x);
    else
      asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.b16 [%1], %2;}" ::"r"(
                       static_cast<uint32_t>(there)),
                   "l"(__cvta_generic_to_global(to)),
                   "h"(static_cast<uint16_t>(pack<bf16>(x).word[0])));
  }

  // Parts and y of a run have been read, and dy of the run before it is there.
  __device__ __forceinline__ void arrive_finished() const {
    __syncwarp();
    if (this_thread() % 32 == 0) arrive(shared_address(&sh.finished));
  }

  // What is left to do for a run when all its sums over states are there: its gradients, dy of the
  // run before it, and the rows that take its rows' place.
  __device__ __forceinline__ void finish_run(const Piece& p, int t0, int j, int tokens,
                                             Ahead& ahead) const {
    const Owner o;
    float q_[kOwn], w[kOwn], y[kOwn], delta[kOwn], s[kOwn], D[kOwn], bias[kOwn];
    add_parts(o, q_, w, y);
    load(delta, own_row(o, j));
    load(s, sh.gates[o.thread][0]);
    load(D, sh.constants[0][o.first]), load(bias, sh.constants[1][o.first]);
    const Inputs in = kept_inputs(o);
    put_row(o, j, ahead.u, ahead.dt, true);
    put_inputs(o, ahead.in);
    arrive_finished();
    const int in_tile = j * kRun + static_cast<int>(o.token), token = t0 + in_tile;
    load_run(o, ahead, p, token - kRun);

    const bool there = in_tile < tokens;
    const Floats<kOwn> us = unpack(in.u), dts = unpack(in.dt), zs = unpack(in.z),
                       dys = unpack(in.dy);
    float du[kOwn], ddt[kOwn], dz[kOwn], ys[kOwn];
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const ElementGrad r = gradients({.u = us[c],
                                       .dt = dts[c],
                                       .z = zs[c],
                                       .dy = dys[c],
                                       .s = s[c],
                                       .delta = delta[c],
                                       .D = D[c],
                                       .dt_bias = bias[c],
                                       .y = y[c],
                                       .q = q_[c],
                                       .w = w[c]});
      du[c] = r.du, ddt[c] = r.ddt, dz[c] = r.dz, ys[c] = r.y;
      float* sums = &sh.sums[o.thread][2 * c];
      sums[0] = fmaf(r.dy, us[c], sums[0]);
      sums[1] += there ? r.ddt : 0.f;
    }
    store_if(there, a.du, a.du_row, token, o, du);
    store_if(there, a.ddt, a.ddt_row, token, o, ddt);
    store_if(there, a.dz, a.dz_row, token, o, dz);
    store_if(there && a.y, a.y, a.y_row, token, o, ys);
  }

  // dB and dC of four tokens of the tile from `t` on, of one of which the lane has two states.
  __device__ __forceinline__ void put_sums(int t0, int t, int tokens,
                                           const float (&sums)[4]) const {
    const uint32_t thread = this_thread();
    float* to = row_of(sh.partial[thread], t0 + t, sums_row(kStates) * 4);
    asm volatile(
        "{.reg .pred p; setp.lt.s32 p, %0, %1;\n"
        "@p st.global.v2.f32 [%2], {%3, %4};\n"
        "@p st.global.v2.f32 [%2 + %7], {%5, %6};}" ::"r"(t + static_cast<int>(thread % 4)),
        "r"(tokens), "l"(__cvta_generic_to_global(to)), "f"(sums[0]), "f"(sums[1]), "f"(sums[2]),
        "f"(sums[3]), "n"(kStates * 4));
  }

  __device__ __forceinline__ void walk_tile(const Piece& p, int t0, Ahead& ahead, Run& a_bar) {
    const int tokens = min(kTile, p.end - t0), last = (tokens - 1) / kRun;
    float h[2][4], y[2][2];
    load_tile(h, p, t0, tokens);
    __syncthreads();  // B, C and rows are there
    if (t0 > p.begin) prefetch_states(p, t0 - kTile);
    Scan::scan_to_last_run(h, last);
    Run hs;
    const auto forward = [&](int j) {
      Scan::load_before(h, j);
      Scan::run_forward(j, h, a_bar, hs, y);
    };
    const auto back = [&](int j) {
      wait_for_phase(shared_address(&sh.finished), runs++);  // y, the parts are free, dy is there
      store4(lane_at, kYAt, y[0][0], y[0][1], y[1][0], y[1][1]);
      Scan::run_back(j, a_bar, hs, [&](int half, const float(&sums)[4]) {
        put_sums(t0, j * kRun + half * 4, tokens, sums);
      });
      __syncthreads();  // every warp's parts and y are there, the run's rows free
      if (owns())
        finish_run(p, t0, j, tokens, ahead);
      else
        arrive_finished();
    };
    forward(last);
    // A run's way back with the next one's way forward: else the compiler moves the exps that are
    // computed early to where they stand one after the other.
#pragma unroll 1
    for (int j = last; j > 0; --j) {
      back(j);
      forward(j - 1);
    }
    back(0);
  }
  static constexpr int kYAt = offsetof(Warp, y) / 4;

  __device__ __forceinline__ void walk(const Piece& p) {
    load_states(carry, p.part ? behind_part(a, p, p.begin) : flows_in(a, p));
    const int last = last_tile(p), last_run = (p.end - last - 1) / kRun;
    Ahead ahead;
    __syncthreads();  // the constants are there, the last piece's rows have been read
    if (owns()) {
      const Owner o;
      const int token = last + last_run * kRun + static_cast<int>(o.token);
      put_inputs(o, load_inputs(o, token, token < p.end));
      load_run(o, ahead, p, token);
      fetch_rows(o, last, p.end, 0);
      if (last > p.begin) fetch_rows(o, last - kTile, last, last_run + 1);
    }
    __syncthreads();  // rows are there
    Run a_bar;
#pragma unroll
    for (int t = 0; t < kEarly; ++t) Scan::decay(a_bar[t], run_rows(last_run), t);
#pragma unroll 1
    for (int t0 = last; t0 >= p.begin; t0 -= kTile) walk_tile(p, t0, ahead, a_bar);
    if (a.dstate && p.first) store_states(carry, a.dstate + p.state_row * plane_of(a));
  }

  __device__ __forceinline__ void store_sums() {
    store_states(dA, a.dA + blockIdx.y * plane_of(a));
    __syncthreads();  // the owners' sums are there
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= 2 * kScanStreamsChannels) return;
    const int which = thread / kScanStreamsChannels, c = thread % kScanStreamsChannels;
    float sum = 0;
    for (int t = 0; t < kRun; ++t) sum += sh.sums[t * kGroups + c / kOwn][c % kOwn * 2 + which];
    a.dD_dbias[(int64_t{blockIdx.y} * 2 + which) * a.d_inner + first_channel() + c] = sum;
  }
};

}  // namespace krait::cuda::scan_streams
