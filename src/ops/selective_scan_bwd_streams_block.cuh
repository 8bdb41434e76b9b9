// What a block of the streams' backward pass does with a piece of a sequence: see
// selective_scan_bwd_streams_cuda.cu.
#pragma once

#include <cstddef>

#include "ops/cuda/async_copy.cuh"
#include "ops/selective_scan_bwd_streams_warp.cuh"

namespace krait::cuda::scan_streams {

template <int kWarps>
struct BlockPlaces {
  using Memory = Shared<kWarps>;
  static constexpr int kStates = kWarpStates;
  static constexpr bool kPartsByChannel = false;
  static constexpr int kDyAt = offsetof(typename Memory::Warp, dy) / 4,
                       kStatesAt = offsetof(typename Memory::Warp, states) / 4,
                       kPartsAt = offsetof(typename Memory::Warp, parts) / 4;
  static constexpr uint32_t kIdentity = offsetof(Memory, identity);
};

template <int kWarps>
struct Block : WarpScan<BlockPlaces<kWarps>> {
  using SharedMemory = Shared<kWarps>;
  using Warp = typename SharedMemory::Warp;
  using Scan = WarpScan<BlockPlaces<kWarps>>;
  using Scan::a, Scan::g, Scan::q, Scan::channel, Scan::state_at, Scan::block_at, Scan::pair_at,
      Scan::dy_at, Scan::lane_at, Scan::bc_at, Scan::carry, Scan::dA, Scan::kStates, Scan::run_rows,
      Scan::load_states, Scan::store_states, Scan::before_tile;
  using typename Scan::Run;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRounds = 4 / kWarps;
  static constexpr int kDyAt = BlockPlaces<kWarps>::kDyAt,
                       kConstants = offsetof(Warp, constants) / 4,
                       kPartsAt = BlockPlaces<kWarps>::kPartsAt,
                       kKept = offsetof(Warp, kept) / 4;  // floats
  static constexpr uint32_t kSums = offsetof(SharedMemory, sums),
                            kSumsBytes = sizeof(SharedMemory::sums);
  enum { kKeptY, kKeptInputs, kKeptSums = 3 };
  Shared<kWarps>& sh;

  __device__ __forceinline__ Block(const Args& args, Shared<kWarps>& shared)
      : Scan(args), sh(shared) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    auto& mine = sh.warp[thread / 32];
    g = lane / 4, q = lane % 4;
    channel = (static_cast<int>(blockIdx.x) * kWarps + thread / 32) * kScanStreamsChannels + g * 2;
    state_at = int64_t{channel} * kStates + q * 4;
    pair_at = pinned_address(&mine.rows[0][g * 4]), dy_at = shared_address(&mine.rows[0][g * 2]);
    lane_at = pinned_address(&mine.rows[0][lane * 4]), bc_at = pinned_address(&sh.bc[0][q * 4]);
    if (thread < 32) Scan::put_identity(sh.identity);
    block_at = pinned_address(&sh);
    for (int k = thread; k < 128; k += 32 * kWarps) {
      const int row = k / 32 % 2 * 4 + k % 4, quad = k / 4 % 4, pair = k / 16 % 2;
      sh.partial[k] =
          (k < 64 ? a.dB : a.dC) + (blockIdx.x * a.tokens + row) * kStates + quad * 4 + pair * 2;
    }
    const Floats<2> D = channels(a.D), bias = channels(a.dt_bias);
    if (q == 0) store4(pair_at, kConstants, D[0], D[1], bias[0], bias[1]);
    __syncwarp();  // the constants are there
    store4(lane_at, kKept + kKeptSums * kLaneStates, 0, 0, 0, 0);
    keep_bc_from();
    Scan::zero(dA);
    Scan::load_A();
  }

  __device__ __forceinline__ uint32_t own_rows(int j) const {
    return run_rows(j) + static_cast<uint32_t>(q) * 2 * kRowPitch * 4;
  }
  // What a lane keeps behind the rows: the gate's sigmoid of its tokens of the run, and where its
  // part of B or C is (finding out takes a division).
  __device__ __forceinline__ uint32_t gates_at() const {
    return lane_at + this_thread() % 32 * ((kRowPitch - 4) * 4) + 32 * 4;
  }
  __device__ __forceinline__ uint32_t bc_from_at() const { return gates_at() + 32 * kRowPitch * 4; }
  __device__ __forceinline__ void keep_bc_from() const {
    const int part = static_cast<int>(threadIdx.x) % 8, at = part % 4 * 4;
    const int group = channel / a.group_channels;
    const bf16* from = (part < 4 ? a.B + group * a.B_group : a.C + group * a.C_group) + at;
    asm volatile("st.shared.v2.u64 [%0], {%1, %2};" ::"r"(bc_from_at()),
                 "l"(reinterpret_cast<uint64_t>(from)),
                 "l"(uint64_t{part < 4 ? a.B_row : a.C_row}));
  }
  // B and C of the tile, zero where there is no token: on their way, and there.
  static constexpr int kStep = 4 * kWarps, kSteps = kTile / kStep;
  __device__ __forceinline__ void load_bc(Packed<bf16, 4> (&x)[kSteps], int t0, int tokens) const {
    uint64_t from, row;
    asm volatile("ld.shared.v2.u64 {%0, %1}, [%2];" : "=l"(from), "=l"(row) : "r"(bc_from_at()));
    const int thread = static_cast<int>(this_thread());
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int t = thread / 8 + k * kStep;
      x[k] = {};
      if (t < tokens)
        x[k] = load_packed<4>(
            row_of(reinterpret_cast<const bf16*>(from), t0 + t, static_cast<uint32_t>(row)));
    }
  }
  __device__ __forceinline__ void put_bc(const Packed<bf16, 4> (&x)[kSteps]) const {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const Floats<4> f = unpack(x[k]);
      *reinterpret_cast<float4*>(&sh.bc[thread / 8 + k * kStep][thread % 8 * 4]) =
          make_float4(f[0], f[1], f[2], f[3]);
    }
  }

  // The lane's channels of two tokens, of those from `begin` on and, if the run may not be whole,
  // before `end`.
  template <bool kWhole>
  __device__ __forceinline__ void load_pairs(Packed<bf16, 2> (&v)[2], const bf16* from,
                                             uint32_t row, int token, int begin, int end) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      v[i] = load_pair(row_of(from + channel, token + i, row),
                       token >= begin && (kWhole || token + i < end));
  }
  __device__ __forceinline__ Floats<2> channels(const float* from) const {
    return from ? load_vector<2>(from + channel) : constant<2>(0);
  }

  // delta and delta u of the lane's channels of two tokens of run j; kWhole: all there.
  template <bool kWhole>
  __device__ __forceinline__ void put_rows(int j, int tokens, const Packed<bf16, 2> (&u)[2],
                                           const Packed<bf16, 2> (&dt)[2]) const {
    float constants[4];
    load4(constants, pair_at, kConstants);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = kWhole || j * kRun + q * 2 + i < tokens;
      const Floats<2> dts = unpack(dt[i]), us = unpack(u[i]);
      float delta0 = softplus(dts[0] + constants[2]), delta1 = softplus(dts[1] + constants[3]);
      delta0 = there ? delta0 : 0.f, delta1 = there ? delta1 : 0.f;
      store4(own_rows(j), i * kRowPitch, delta0, delta1, delta0 * us[0], delta1 * us[1]);
    }
  }
  __device__ __forceinline__ void put_dy(const Packed<bf16, 2> (&z)[2],
                                         const Packed<bf16, 2> (&dy)[2]) const {
    float s[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Floats<2> zs = unpack(z[i]), dys_ = unpack(dy[i]);
      s[i][0] = sigmoid(zs[0]), s[i][1] = sigmoid(zs[1]);
      store2(dy_at + static_cast<uint32_t>(q) * 2 * kDyPitch * 4, kDyAt + i * kDyPitch,
             dys_[0] * (zs[0] * s[i][0]), dys_[1] * (zs[1] * s[i][1]));
    }
    store4(gates_at(), 0, s[0][0], s[0][1], s[1][0], s[1][1]);
  }

  // delta and delta u of the tile from run j on.
  __device__ __forceinline__ void fetch_rows(int t0, int end, int j) const {
    constexpr int kAhead = 4;  // runs whose loads are under way at once
#pragma unroll 1
    for (; j < kRuns && t0 + j * kRun < end; j += kAhead) {
      Packed<bf16, 2> u[kAhead][2], dt[kAhead][2];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int token = t0 + (j + k) * kRun + q * 2, limit = min(end, t0 + kTile);
        load_pairs<false>(u[k], a.u, a.u_row, token, t0, limit);
        load_pairs<false>(dt[k], a.dt, a.dt_row, token, t0, limit);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (j + k >= kRuns) break;
        put_rows<false>(j + k, end - t0, u[k], dt[k]);
      }
    }
  }

  // Where the lane puts dB and dC of the run's first half.
  __device__ __forceinline__ uint32_t sums_of_run(int j) const {
    const uint32_t thread = this_thread();
    return block_at + kSums + static_cast<uint32_t>(j & 1) * (kSumsBytes / 2) +
           thread / 32 * (2 * kLaneStates * 4) + thread % 32 * 8;
  }
  // dB, dC of the run: over the warps.
  __device__ __forceinline__ void add_warps(int t0, int j, int tokens) const {
    const uint32_t thread = this_thread();
#pragma unroll
    for (uint32_t round = 0; round < kRounds; ++round) {
      const uint32_t k = round * 32 * kWarps + thread, kind = k / 64, row = k / 32 % 2 * 4 + k % 4;
      const uint32_t from = block_at + kSums + static_cast<uint32_t>(j & 1) * (kSumsBytes / 2) +
                            kind * (kLaneStates * 4) + k % 64 * 8;
      float sum[2];
      load2(sum, from);
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) {
        float v[2];
        load2(v, from, warp * 2 * kLaneStates);
        sum[0] += v[0], sum[1] += v[1];
      }
      float* to = row_of(sh.partial[k], t0 + j * kRun, kStates * 4);
      if (j * kRun + static_cast<int>(row) < tokens)
        asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
                     "f"(sum[0]), "f"(sum[1]));
    }
  }

  // y, and q and w over the states of the block.
  __device__ __forceinline__ void add_parts(Outputs& out) const {
    float y[4];
    load4(y, lane_at, kKept + kKeptY * kLaneStates);
    out.y[0][0] = y[0], out.y[0][1] = y[1], out.y[1][0] = y[2], out.y[1][1] = y[3];
    // Of the first of the quad's lanes and the first of the lane's tokens.
    static_assert(kPartsAt % 16 == 0 && offsetof(SharedMemory, warp) % 64 == 0 &&
                  sizeof(Warp) % 64 == 0);  // bits 4 and 5 of lane_at are q
    const uint32_t own = lane_at + static_cast<uint32_t>(q) * (2 * kLaneStates * 4);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float v[4];  // in an order that has no bank conflicts
        load4(v, own ^ (static_cast<uint32_t>(k) * 16), kPartsAt + i * kLaneStates);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          out.q[i][c] = k == 0 ? v[Scan::q_at(c)] : out.q[i][c] + v[Scan::q_at(c)];
          out.w[i][c] = k == 0 ? v[Scan::w_at(c)] : out.w[i][c] + v[Scan::w_at(c)];
        }
      }
  }

  // du, ddt, dz and y of two tokens.
  __device__ __forceinline__ void store_outputs(const Outputs& out, const Pairs& in,
                                                const float (&deltas)[2][4], int j, int t0,
                                                int tokens) {
    float constants[4], gates[4], sums[4];  // sums: dD, ddt_bias
    load4(gates, gates_at());
    load4(constants, pair_at, kConstants);
    load4(sums, lane_at, kKept + kKeptSums * kLaneStates);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = j * kRun + q * 2 + i;
      const bool there = t < tokens;
      const int token = t0 + t;
      const Floats<2> us = unpack(in.u[i]), zs = unpack(in.z[i]), dts = unpack(in.dt[i]),
                      dys_ = unpack(in.dy[i]);
      Floats<2> du, ddt, dz, y;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const ElementGrad r = gradients({.u = us[c],
                                         .dt = dts[c],
                                         .z = zs[c],
                                         .dy = dys_[c],
                                         .s = gates[i * 2 + c],
                                         .delta = deltas[i][c],
                                         .D = constants[c],
                                         .dt_bias = constants[2 + c],
                                         .y = out.y[i][c],
                                         .q = out.q[i][c],
                                         .w = out.w[i][c]});
        du[c] = r.du, ddt[c] = r.ddt, dz[c] = r.dz, y[c] = r.y;
        sums[c] = fmaf(r.dy, us[c], sums[c]);
        sums[2 + c] += there ? ddt[c] : 0.f;
      }
      store_pair_if(there, row_of(a.du + channel, token, a.du_row), du);
      store_pair_if(there, row_of(a.ddt + channel, token, a.ddt_row), ddt);
      store_pair_if(there, row_of(a.dz + channel, token, a.dz_row), dz);
      store_pair_if(there && a.y, row_of(a.y + channel, token, a.y_row), y);
    }
    store4(lane_at, kKept + kKeptSums * kLaneStates, sums[0], sums[1], sums[2], sums[3]);
  }

  // What is on its way from global memory while the run before (behind, in time) is being walked.
  struct Ahead {
    Pairs in;                     // the inputs of the next run
    Packed<bf16, 2> u[2], dt[2];  // of the run 64 tokens before it, whose rows take its rows' place
    float h[2][4];                // before the next tile
    Packed<bf16, 4> bc[kSteps];   // of the next tile
  };

  // Of the run whose first token of the lane is that. Only a piece's last run may not be whole.
  template <bool kWhole>
  __device__ __forceinline__ void load_run(Ahead& ahead, const Piece& p, int token) const {
    load_pairs<kWhole>(ahead.in.u, a.u, a.u_row, token, p.begin, p.end);
    load_pairs<kWhole>(ahead.in.dt, a.dt, a.dt_row, token, p.begin, p.end);
    load_pairs<kWhole>(ahead.in.z, a.z, a.z_row, token, p.begin, p.end);
    load_pairs<kWhole>(ahead.in.dy, a.dy, a.dy_row, token, p.begin, p.end);
    load_pairs<true>(ahead.u, a.u, a.u_row, token - kTile, p.begin, p.end);
    load_pairs<true>(ahead.dt, a.dt, a.dt_row, token - kTile, p.begin, p.end);
  }
  // Brings into the L2 cache what load_run will want for the run that begins there: else its loads
  // take longer than what is computed meanwhile. A lane has a token of one of four tensors.
  __device__ __forceinline__ void prefetch_run(const Piece& p, int token) const {
    const uint32_t lane = this_thread() % 32, tensor = lane / 8;
    token += static_cast<int>(lane % 8) - (tensor < 2 ? kTile : 0);
    const bf16* from =
        row_of((&a.u)[tensor] + (channel & -kScanStreamsChannels), token, (&a.u_row)[tensor]);
    if (token >= p.begin) asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  }
  __device__ __forceinline__ void load_tile(Ahead& ahead, const Piece& p, int t0) const {
    load_states(ahead.h, before_tile(p, t0));
    load_bc(ahead.bc, t0, p.end - t0);
  }

  // The inputs of the run that is being walked rest in shared memory.
  __device__ __forceinline__ void keep_inputs(const Pairs& in) const {
    const auto put = [&](int k, const Packed<bf16, 2>(&x)[2], const Packed<bf16, 2>(&y)[2]) {
      store4(lane_at, kKept + k * kLaneStates, __uint_as_float(x[0].word[0]),
             __uint_as_float(x[1].word[0]), __uint_as_float(y[0].word[0]),
             __uint_as_float(y[1].word[0]));
    };
    put(kKeptInputs, in.u, in.dt), put(kKeptInputs + 1, in.z, in.dy);
  }
  __device__ __forceinline__ void kept_inputs(Pairs& in) const {
    const auto get = [&](int k, Packed<bf16, 2>(&x)[2], Packed<bf16, 2>(&y)[2]) {
      float v[4];
      load4(v, lane_at, kKept + k * kLaneStates);
      x[0].word[0] = __float_as_uint(v[0]), x[1].word[0] = __float_as_uint(v[1]);
      y[0].word[0] = __float_as_uint(v[2]), y[1].word[0] = __float_as_uint(v[3]);
    };
    get(kKeptInputs, in.u, in.dt), get(kKeptInputs + 1, in.z, in.dy);
  }

  __device__ __forceinline__ void walk_tile(const Piece& p, int t0, Ahead& ahead, Run& a_bar) {
    const int tokens = min(kTile, p.end - t0), last = (tokens - 1) / kRun;
    float h[2][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) h[0][s] = ahead.h[0][s], h[1][s] = ahead.h[1][s];
    Scan::scan_to_last_run(h, last);
#pragma unroll 1
    for (int j = last; j >= 0; --j) {
      Scan::load_before(h, j);
      Run hs;
      float y[2][2];
      Scan::run_forward(j, h, a_bar, hs, y);
      store4(lane_at, kKept + kKeptY * kLaneStates, y[0][0], y[0][1], y[1][0], y[1][1]);
      keep_inputs(ahead.in);
      put_dy(ahead.in.z, ahead.in.dy);
      __syncwarp();  // dy of the run is there
      const uint32_t sums_to = sums_of_run(j);
      Scan::run_back(j, a_bar, hs, [&](int half, const float(&sums)[4]) {
        store2(sums_to, half * 64, sums[0], sums[1]);
        store2(sums_to, kLaneStates + half * 64, sums[2], sums[3]);
      });
      __syncthreads();  // every warp's dB and dC are there
      add_warps(t0, j, tokens);
      Outputs out;
      add_parts(out);
      Pairs in;
      kept_inputs(in);
      float deltas[2][4];
      load4(deltas[0], own_rows(j)), load4(deltas[1], own_rows(j), kRowPitch);
      put_rows<true>(j, kTile, ahead.u, ahead.dt);
      load_run<true>(ahead, p, t0 + (j - 1) * kRun + q * 2);
      prefetch_run(p, t0 + (j - 2) * kRun);
      if (__builtin_expect(j == 0 && t0 > p.begin, 0)) load_tile(ahead, p, t0 - kTile);
      store_outputs(out, in, deltas, j, t0, tokens);
    }
  }

  __device__ __forceinline__ void walk(const Piece& p) {
    load_states(carry, p.part ? behind_part(a, p, p.begin) : flows_in(a, p));
    const int last = last_tile(p), last_run = (p.end - last - 1) / kRun;
    Ahead ahead;
    load_run<false>(ahead, p, last + last_run * kRun + q * 2);
    load_tile(ahead, p, last);
    __syncwarp();  // the last piece's rows have been read
    fetch_rows(last, p.end, 0);
    if (last > p.begin) fetch_rows(last - kTile, last, last_run + 1);
    __syncwarp();  // rows are there
    Run a_bar;
#pragma unroll
    for (int t = 0; t < kEarly; ++t) Scan::decay(a_bar[t], run_rows(last_run), t);
#pragma unroll 1
    for (int t0 = last; t0 >= p.begin; t0 -= kTile) {
      put_bc(ahead.bc);
      __syncthreads();  // B, C and rows are there
      walk_tile(p, t0, ahead, a_bar);
    }
    if (a.dstate && p.first) store_states(carry, a.dstate + p.state_row * plane_of(a));
  }

  __device__ __forceinline__ void store_sums() {
    store_states(dA, a.dA + blockIdx.y * plane_of(a));
    float sums[4];
    load4(sums, lane_at, kKept + kKeptSums * kLaneStates);
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
      for (float& sum : sums) sum += __shfl_xor_sync(~0u, sum, bit);
    if (q > 0) return;
    float* to = a.dD_dbias + int64_t{blockIdx.y} * 2 * a.d_inner + channel;
    *reinterpret_cast<float2*>(to) = make_float2(sums[0], sums[1]);
    *reinterpret_cast<float2*>(to + a.d_inner) = make_float2(sums[2], sums[3]);
  }
};

}  // namespace krait::cuda::scan_streams
