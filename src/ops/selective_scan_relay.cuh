// The selective scan's forward pass where channels are few: the warps of a block scan the same
// channels in turn, and each computes what it can before the state reaches it.
#pragma once

#include "ops/cuda/mbarrier.cuh"
#include "ops/selective_scan_fwd.cuh"

namespace krait::cuda::scan_fwd {

// Warp w scans the steps w, w + kWarps, .. of the piece. What a step needs but the state (A_bar,
// delta B u) is computed into registers, then the warp waits for the one before it, scans, hands on
// the state, and sums y. Nothing else is shared by the warps, so that they may be far apart.
template <class T>
struct Relay {
  static constexpr int L = 4, S = 4, kWarps = kScanRelayWarps;
  using Block = Tile<T, L, S, 32, true>;
  static constexpr int kStep = Block::kStep, kStates = L * S, kRow = 2 * kStates;
  static constexpr int kQuads = kStep * kRow / 4 / 32;  // of B and C, of a lane

  // Handed from step to step.
  struct Carry {
    float4 h[32];      // the state
    float4 g[32];      // the state had it been zero at the segment's start
    float4 start[32];  // the state at the segment's start
    float sum[32];     // of delta, since then
  };
  struct Shared {
    Carry carry;
    uint64_t handed[kWarps];  // barriers: the state is there for warp w
    alignas(16) float bc[kWarps][2][kStep][kRow];
    typename Block::Exchange warp[kWarps];
  };

  struct States {
    float A[S], h[S], g[S];
  };
  struct Quads {
    Packed<T, 4> q[kQuads];
  };

  static __device__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ int thread() { return static_cast<int>(threadIdx.x) % 32; }

  // Four states of B or C to a lane, of every kQuadTokens-th token of a step.
  static constexpr int kQuadTokens = kStep / kQuads;
  static __device__ int quad_which() { return thread() % (kRow / 4) / (kStates / 4); }
  static __device__ int quad_state() { return thread() % (kStates / 4) * 4; }
  static __device__ int quad_token() { return thread() / (kRow / 4); }
  // left: tokens from the lane's first one to the piece's end.
  template <bool kVector>
  static __device__ void fetch_bc(Quads& raw, const T* from, int row_bytes, int count, int left) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      raw.q[i] = load_quad<kVector>(behind(from, i * kQuadTokens, row_bytes),
                                    i * kQuadTokens < left ? count : 0);
  }
  static __device__ void stage_bc(float (*bc)[kRow], const Quads& raw) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const Floats<4> x = unpack(raw.q[i]);
      *reinterpret_cast<float4*>(
          &bc[quad_token() + i * kQuadTokens][Block::place(quad_which(), quad_state())]) =
          make_float4(x[0], x[1], x[2], x[3]);
    }
  }

  // The 32 lanes of the warp before arrive; turn: how often this warp has waited.
  static __device__ void wait(Shared& shared, uint32_t turn) {
    wait_for_phase(shared_address(&shared.handed[warp()]), turn);
  }
  static __device__ void hand_on(Shared& shared) {
    arrive(shared_address(&shared.handed[(warp() + 1) % kWarps]));
  }

  // A_bar and delta B u of a step; A_bar makes place for the state.
  struct Prepared {
    float d[kStep][S], x[kStep][S];
  };
  static __device__ void prepare(Prepared& out, const float (*bc)[kRow], const float* pair,
                                 const float (&A)[S]) {
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      const float2 delta = *reinterpret_cast<const float2*>(pair + 2 * t);
      const float4 b4 =
          *reinterpret_cast<const float4*>(&bc[t][Block::place(0, Block::lane_of() * S)]);
      const float b[S] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
      for (int s = 0; s < S; ++s)
        out.d[t][s] = exp2_approx(delta.x * A[s]), out.x[t][s] = delta.y * b[s];
    }
  }

  // Scans a step, hands the state on. kFromZero: as in Tile.
  template <bool kFromZero>
  static __device__ void scan(Shared& shared, Prepared& in, States& x, const float* pair,
                              bool segment_ends) {
    Carry& carry = shared.carry;
#pragma unroll
    for (int t = 0; t < kStep; ++t)
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if constexpr (kFromZero) x.g[s] = fmaf(in.d[t][s], x.g[s], in.x[t][s]);
        x.h[s] = in.d[t][s] = fmaf(in.d[t][s], x.h[s], in.x[t][s]);
      }
    if constexpr (kFromZero) {
      float sum = carry.sum[thread()];
#pragma unroll
      for (int t = 0; t < kStep; ++t) sum += pair[2 * t];
      carry.sum[thread()] = sum;
      if (segment_ends) {
        const float4 start = carry.start[thread()];
        const float from[S] = {start.x, start.y, start.z, start.w};
#pragma unroll
        for (int s = 0; s < S; ++s) x.h[s] = fmaf(exp2_approx(x.A[s] * sum), from[s], x.g[s]);
      }
      carry.g[thread()] = make_float4(x.g[0], x.g[1], x.g[2], x.g[3]);
    }
    carry.h[thread()] = make_float4(x.h[0], x.h[1], x.h[2], x.h[3]);
    hand_on(shared);
  }

  // y of a step: sums over a channel's lanes.
  static __device__ void project(float (*to)[Block::kYRow < 4 ? 4 : Block::kYRow],
                                 const Prepared& in, const float (*bc)[kRow]) {
    const int lane = Block::lane_of();
#pragma unroll
    for (int t0 = 0; t0 < kStep; t0 += Block::kSummed) {
      float sums[Block::kSummed];
#pragma unroll
      for (int t = 0; t < Block::kSummed; ++t) {
        float b[S], c[S];
        Block::read_bc(b, c, bc[t0 + t], lane);
        sums[t] = sum_of_pairs(in.d[t0 + t], c);
      }
      to[t0 + lane % Block::kSummed][Block::channel_of()] =
          sum_lanes<L, Block::kSummed, Block::kWarpChannels>(sums, lane);
    }
  }

  // What a warp keeps from step to step. Inputs of the step before wait for their y, those of the
  // next four steps are in shared memory or on their way there.
  struct Warp {
    States x;
    typename Block::Lane at;
    typename Block::Own before, now;
    Quads raw;      // B and C of the step after the next
    const T* bc;    // the lane's, of its first token of the piece
    int bc_row;     // bytes to the next token's
    int stage = 0;  // of the step at work
    uint32_t turn = 0;
    int64_t row;  // of its states in (d_inner, d_state)
    int count;    // of its states that are there
  };

  template <int kHalf>
  static __device__ __forceinline__ void step(Shared& shared, Warp& w, const Args& a,
                                              const Piece& piece, int r) {
    constexpr int kStride = kStep * kWarps;
    typename Block::Exchange& own = shared.warp[warp()];
    auto& bc = shared.bc[warp()];
    const int length = static_cast<int>(piece.end - piece.begin), owner = thread();
    const int behind = static_cast<int>(piece.begin - piece.seq_begin) + r * kStep;
    const int64_t plane = static_cast<int64_t>(a.d_inner) * a.d_state;
    wait_for_copies<Block::kStages - 2>();
    const typename Block::Own next = Block::take_own(w.at, (w.stage + 1) % Block::kStages);
    Block::fetch_own(w.at, a, w.stage, Block::kStages, w.at.left - Block::kStages * kStride);
    const Floats<Block::kOwn> sums = Block::take_sums(own.y[kHalf ^ 1], owner);
    const auto deltas = Block::deltas(next, w.at);
    const float* const pair = own.pair[kHalf][Block::channel_of()];
    Prepared in;
    prepare(in, bc[kHalf], pair, w.x.A);
    Block::finish(w.before, sums, w.at, a);
    // Shared memory is written last: reads cannot be moved over a write.
    Block::hand_over(own.pair[kHalf ^ 1], deltas, owner);
    stage_bc(bc[kHalf ^ 1], w.raw);
    fetch(w, a, piece, r + 2 * kWarps);
    w.at.due = w.at.left, w.at.left -= kStride, ++w.at.step;
    w.before = w.now, w.now = next, w.stage = (w.stage + 1) % Block::kStages;

    if (r > 0) wait(shared, w.turn++);
    Carry& carry = shared.carry;
    const float4 h = carry.h[thread()], g = carry.g[thread()];
    w.x.h[0] = h.x, w.x.h[1] = h.y, w.x.h[2] = h.z, w.x.h[3] = h.w;
    w.x.g[0] = g.x, w.x.g[1] = g.y, w.x.g[2] = g.z, w.x.g[3] = g.w;
    const bool middle = behind >= kScanSegment && piece.seq_end - piece.seq_begin >
                                                      (behind / kScanSegment + 1) * kScanSegment;
    if (behind % kScanChunk == 0 && behind > 0) {
      if (behind % kScanSegment == 0) {
        carry.start[thread()] = h;
        carry.sum[thread()] = 0;
        w.x.g[0] = w.x.g[1] = w.x.g[2] = w.x.g[3] = 0;
      }
      if (a.saved)
        store_states(a.saved + ((piece.begin + r * kStep) / kScanChunk - 1) * plane + w.row, w.x.h,
                     w.count, a.vector_saved);
    }
    // Two uses of what was prepared keep the compiler from computing it behind the wait.
    if (middle)
      scan<true>(shared, in, w.x, pair, (behind + kStep) % kScanSegment == 0);
    else
      scan<false>(shared, in, w.x, pair, false);
    if (length - r * kStep <= kStep && a.state) {
      const int64_t slot = a.slot ? a.slot[piece.sequence] : piece.sequence;
      unsign_zeros(w.x.h);
      store_states(a.state + slot * plane + w.row, w.x.h, w.count, a.vector_saved);
    }
    project(own.y[kHalf], in, bc[kHalf]);
    __syncwarp();  // the next step's delta, B and C and this one's y are there, those before may go
  }

  static __device__ void fetch(Warp& w, const Args& a, const Piece& piece, int r) {
    const T* from = behind(w.bc, r * kStep, w.bc_row);
    const int count = a.d_state - quad_state(),
              left = static_cast<int>(piece.end - piece.begin) - r * kStep - quad_token();
    if (a.vector_states)
      fetch_bc<true>(w.raw, from, w.bc_row, count, left);
    else
      fetch_bc<false>(w.raw, from, w.bc_row, count, left);
  }
  static __device__ void place_bc(Warp& w, const Args& a, const Piece& piece, int group) {
    const bool B = quad_which() == 0;
    const int64_t row = B ? a.B_row : a.C_row;
    w.bc = (B ? static_cast<const T*>(a.B) + group * a.B_group
              : static_cast<const T*>(a.C) + group * a.C_group) +
           (piece.begin + quad_token()) * row + quad_state();
    w.bc_row = static_cast<int>(row * int64_t{sizeof(T)});
  }

  // Where the lane's states and elements are; c0, c_end: the block's first channel, its group's
  // end.
  static __device__ void place_states(Warp& w, const Args& a, int c0, int c_end) {
    const int c = c0 + Block::channel_of(), n = Block::lane_of() * S;
    w.row = static_cast<int64_t>(c) * a.d_state + n;
    w.count = c < c_end ? a.d_state - n : 0;
    load_states(w.x.A, a.A + w.row, w.count, a.vector_saved);
#pragma unroll
    for (float& x : w.x.A) x *= kLog2E;
  }
  static __device__ void place_elements(Shared& shared, Warp& w, const Args& a, const Piece& piece,
                                        int c0, int c_end) {
    const int owner = thread(), token = owner / Block::kOwners;
    const int own_c = c0 + owner % Block::kOwners * Block::kOwn;
    const int64_t first = piece.begin + warp() * kStep + token;
    w.at.u = static_cast<const T*>(a.u) + first * a.u_row + own_c;
    w.at.dt = static_cast<const T*>(a.dt) + first * a.dt_row + own_c;
    w.at.z = static_cast<const T*>(a.z) + first * a.z_row + own_c;
    w.at.y = static_cast<T*>(a.y) + (first - kStep * kWarps) * a.y_row + own_c;
    w.at.there = token < kStep && own_c < c_end;
#pragma unroll
    for (int i = 0; i < Block::kOwn; ++i) {
      w.at.D[i] = w.at.there && a.D ? a.D[own_c + i] : 0.f;
      w.at.bias[i] = w.at.there && a.dt_bias ? a.dt_bias[own_c + i] : 0.f;
    }
    w.at.to = shared_address(shared.warp[warp()].inputs) + owner * Block::kCopyBytes;
    w.at.u_at = Block::place_of(w.at.u, w.at.to, 0);
    w.at.dt_at = Block::place_of(w.at.dt, w.at.to, 1);
    w.at.z_at = Block::place_of(w.at.z, w.at.to, 2);
    w.at.left = static_cast<int>(piece.end - piece.begin) - warp() * kStep - token;
    w.at.due = w.at.step = 0;
  }
  // One warp leaves the initial state, and the barriers.
  static __device__ void share_state(Shared& shared, Warp& w, const Args& a, const Piece& piece) {
    const int64_t slot = a.slot ? a.slot[piece.sequence] : piece.sequence,
                  plane = static_cast<int64_t>(a.d_inner) * a.d_state;
    load_states(w.x.h, (a.state ? a.state + slot * plane : a.A) + w.row, a.state ? w.count : 0,
                a.vector_saved);
    shared.carry.h[thread()] = make_float4(w.x.h[0], w.x.h[1], w.x.h[2], w.x.h[3]);
    shared.carry.g[thread()] = make_float4(0, 0, 0, 0);
    if (thread() < kWarps) init_mbarrier(shared_address(&shared.handed[thread()]), 32);
  }

  // The piece is a whole sequence.
  static __device__ void scan_piece(Shared& shared, const Args& a, const Piece& piece) {
    const int block = static_cast<int>(blockIdx.x) % a.channel_blocks;
    Warp w;
    const int group = block / a.group_blocks;
    const int c0 = group * a.group_width + block % a.group_blocks * Block::kWarpChannels;
    const int c_end = (group + 1) * a.group_width;
    place_states(w, a, c0, c_end);
    if (warp() == 0) share_state(shared, w, a, piece);
    place_elements(shared, w, a, piece, c0, c_end);
    place_bc(w, a, piece, group);
    fetch(w, a, piece, warp());
#pragma unroll
    for (int i = 0; i < Block::kStages; ++i)
      Block::fetch_own(w.at, a, i, i, w.at.left - i * kStep * kWarps);
    wait_for_copies<Block::kStages - 1>();
    w.before = w.now = Block::take_own(w.at, 0);
    typename Block::Exchange& own = shared.warp[warp()];
    Block::hand_over(own.pair[0], Block::deltas(w.now, w.at), thread());
    stage_bc(shared.bc[warp()][0], w.raw);
    fetch(w, a, piece, warp() + kWarps);
    __syncthreads();  // the initial state and the barriers are there; delta, B and C too

    const int steps = static_cast<int>((piece.end - piece.begin + kStep - 1) / kStep);
    int last = 1;  // half of y that the last step has left
#pragma unroll 1
    for (int r = warp(); r < steps; r += 2 * kWarps) {
      step<0>(shared, w, a, piece, r);
      last = 0;
      if (r + kWarps >= steps) break;
      step<1>(shared, w, a, piece, r + kWarps);
      last = 1;
    }
    Block::finish(w.before, Block::take_sums(own.y[last], thread()), w.at, a);
  }
};

}  // namespace krait::cuda::scan_fwd
