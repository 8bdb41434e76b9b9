// The first passes of the streams' backward pass: what flows back (the carry) into the pieces of
// long sequences, and into the parts of pieces.
#include "ops/cuda/mma.cuh"
#include "ops/cuda/state.h"
#include "ops/selective_scan_bwd_streams.cuh"

namespace krait::cuda {
namespace {

using namespace scan_streams;

constexpr int kThreads = kScanStreamsCarryThreads, kChannels = kThreads / kWarpStates;
constexpr int kPairs = kChannels / 2;
constexpr int kRow = kTile + 4;           // floats: rows lie 4 banks apart
static_assert(kWarpStates == kChannels);  // C is moved as the others are

struct Shared {
  float delta[kChannels][kRow], dy[kChannels][kRow], C[kWarpStates][kRow];
};
constexpr int kMovers = kThreads / 32;  // warps

// A thread has one state of one channel: the chain through time is two operations a token. As a
// mover of tiles it has two channels (and two states of C) of the tokens t and t + 32.
struct Walker {
  const Args& a;
  Shared* sh;                            // two, which take turns
  int turn = 0, channel, state, state0;  // state0: the block's first
  int move_t, move_pair, move_channel;
  const bf16* C_from;  // of the states that the thread moves
  float A, carry;
  float sum[2] = {};  // of delta that passed by: of the channels that the thread moves
  Packed<bf16, 2> dt[2], z[2], dy[2], C[2];

  __device__ __forceinline__ Walker(const Args& args, Shared* shared) : a(args), sh(shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const int groups = a.d_state / kWarpStates;  // of states
    const int channel0 = static_cast<int>(blockIdx.x) / groups * kChannels;
    state0 = static_cast<int>(blockIdx.x) % groups * kWarpStates;
    channel = channel0 + thread / kWarpStates, state = state0 + thread % kWarpStates;
    move_t = thread / kPairs, move_pair = thread % kPairs;
    move_channel = channel0 + move_pair * 2;
    C_from = a.C + channel / a.group_channels * a.C_group + state0 + move_pair * 2;
    asm volatile("" : "+l"(C_from));  // else it is divided for every tile
    A = a.A[at()] * kLog2E;
  }
  __device__ __forceinline__ int64_t at() const { return int64_t{channel} * a.d_state + state; }

  __device__ __forceinline__ void fetch(int t0, int tokens) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int t = move_t + k * (kTile / 2);
      const int token = t0 + t;
      dt[k] = load_pair(row_of(a.dt + move_channel, token, a.dt_row), t < tokens);
      z[k] = load_pair(row_of(a.z + move_channel, token, a.z_row), t < tokens);
      dy[k] = load_pair(row_of(a.dy + move_channel, token, a.dy_row), t < tokens);
      C[k] = load_pair(row_of(C_from, token, a.C_row), t < tokens);
    }
  }

  // Where there is no token delta and dy are zero: the carry stays as it is.
  __device__ __forceinline__ void put(int tokens) {
    Floats<2> bias = constant<2>(0);
    if (a.dt_bias) bias = load_vector<2>(a.dt_bias + move_channel);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int t = move_t + k * (kTile / 2);
      const Floats<2> dts = unpack(dt[k]), zs = unpack(z[k]), dys = unpack(dy[k]),
                      Cs = unpack(C[k]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = move_pair * 2 + i;
        const float delta = t < tokens ? softplus(dts[i] + bias[i]) : 0.f;
        sum[i] += delta;
        sh[turn].delta[row][t] = delta;
        sh[turn].dy[row][t] = dys[i] * silu(zs[i]);
        sh[turn].C[row][t] = Cs[i];
      }
    }
  }

  __device__ __forceinline__ void scan() {
    const int thread = static_cast<int>(threadIdx.x);
    const float* deltas = sh[turn].delta[thread / kWarpStates];
    const float* dys = sh[turn].dy[thread / kWarpStates];
    const float* Cs = sh[turn].C[thread % kWarpStates];
    constexpr int kGroup = 16;  // tokens whose operands are loaded, and exps computed, ahead
#pragma unroll
    for (int t0 = kTile - kGroup; t0 >= 0; t0 -= kGroup) {
      float a_bar[kGroup], y[kGroup], c[kGroup];
#pragma unroll
      for (int t = kGroup - 4; t >= 0; t -= 4) {
        const Floats<4> delta = load_vector<4>(deltas + t0 + t), y4 = load_vector<4>(dys + t0 + t),
                        c4 = load_vector<4>(Cs + t0 + t);
#pragma unroll
        for (int k = 3; k >= 0; --k)
          a_bar[t + k] = exp2_approx(delta[k] * A), y[t + k] = y4[k], c[t + k] = c4[k];
      }
#pragma unroll
      for (int t = kGroup - 1; t >= 0; --t) carry = fmaf(y[t], c[t], carry) * a_bar[t];
    }
  }

  // Walks the tiles from the last to the one at `stop`; after(t0) is called with what flows out.
  template <class F>
  __device__ __forceinline__ void walk(const Piece& p, int stop, const F& after) {
    int t0 = last_tile(p);
    if (t0 >= stop) fetch(t0, p.end - t0);
#pragma unroll 1
    for (; t0 >= stop; t0 -= kTile) {
      put(p.end - t0);
      __syncthreads();  // the tile is there, and everyone is done with the one before the last
      if (t0 > stop) fetch(t0 - kTile, kTile);
      scan();
      after(t0);
      turn ^= 1;
    }
  }

  // What flows out of a piece if nothing flows in, and the sum of delta; into the slot of the piece
  // before it.
  __device__ __forceinline__ void from_zero(const Piece& p) {
    carry = sum[0] = sum[1] = 0;
    walk(p, p.begin, [](int) {});
    a.behind[(p.slot - 1) * plane_of(a) + at()] = carry;
    add_sums(p);
  }

  // The channels' sums of delta over those who moved them.
  __device__ __forceinline__ void add_sums(const Piece& p) {
    const int thread = static_cast<int>(threadIdx.x);
    float(*sums)[kChannels] = reinterpret_cast<float(*)[kChannels]>(&sh[turn].delta);
#pragma unroll
    for (int bit = kPairs; bit < 32; bit *= 2)
#pragma unroll
      for (float& x : sum) x += __shfl_xor_sync(~0u, x, bit);
    if (thread % 32 < kPairs)
      sums[thread / 32][move_pair * 2] = sum[0], sums[thread / 32][move_pair * 2 + 1] = sum[1];
    __syncthreads();
    if (thread < kChannels && state0 == 0) {
      float all = 0;
#pragma unroll
      for (int warp = 0; warp < kMovers; ++warp) all += sums[warp][thread];
      a.delta_sums[(p.slot - 1) * a.d_inner + (channel - thread / kWarpStates) + thread] = all;
    }
    __syncthreads();  // the next piece's tiles may come
  }

  // What flows into the parts of a piece: the bits that come by when it is walked as a whole.
  __device__ __forceinline__ void into_parts(const Piece& p) {
    const float* in = flows_in(a, p);
    carry = in ? in[at()] : 0.f;
    behind_part(a, p, p.begin + (p.end - p.begin - 1) / a.part * a.part)[at()] = carry;
    walk(p, p.begin + a.part, [&](int t0) {
      if (((t0 - p.begin) & (a.part - 1)) == 0) behind_part(a, p, t0 - a.part)[at()] = carry;
    });
  }
};

// Grid: plan.carry_blocks x plan.carry_walkers; a block has 16 channels, 16 states of each. On
// chip: two tiles of delta, dy and C. Moves 6 bytes an element; the barrier a tile is for the
// sharing of tiles. kFromZero comes where sequences may be long, the other where blocks are few.
template <bool kFromZero>
__global__ void __launch_bounds__(kThreads, kScanStreamsCarryBlocks)
    selective_scan_bwd_streams_carry(const __grid_constant__ Args a) {
  __shared__ Shared tiles[2];
  Walker walker(a, tiles);
#pragma unroll 1
  for (int64_t index = blockIdx.y + (kFromZero ? 0 : a.whole); index < a.pieces;
       index += gridDim.y) {
    Piece p;
    if (!find_piece(a, index, p)) continue;
    if constexpr (kFromZero) {
      if (!p.first) walker.from_zero(p);
    } else {
      walker.into_parts(p);
    }
  }
}

// From what pieces give back from zero to what flows into the pieces before them, in place. Grid: a
// thread for each (channel, state) of each slot, of which a long sequence's first one does the
// work.
__global__ void __launch_bounds__(kScanStreamsChainThreads)
    selective_scan_bwd_streams_chain(const __grid_constant__ Args a, int blocks_per_slot) {
  const int32_t* start = a.seq_start;
  const int64_t slot = blockIdx.x / blocks_per_slot;
  const int sequence =
      last_not_above(a.num_seqs, slot, [=](int i) { return int64_t{start[i] / kPiece}; });
  const int64_t plane = plane_of(a);
  const int64_t i = int64_t{blockIdx.x % blocks_per_slot} * kScanStreamsChainThreads + threadIdx.x;
  const int begin = start[sequence], length = start[sequence + 1] - begin;
  if (begin / kPiece != slot) return;
  if (i >= plane || length <= kPiece) return;
  float* behind = a.behind + begin / kPiece * plane + i;
  const float* sums = a.delta_sums + int64_t{begin / kPiece} * a.d_inner + i / a.d_state;
  const float A = a.A[i] * kLog2E;
  float x = a.dstate ? a.dstate[(a.slot ? a.slot[sequence] : sequence) * plane + i] : 0.f;
  a.behind_last[begin / kPiece * plane + i] = x;
  constexpr int kAhead = 8;  // pieces whose loads are under way at once
  for (int last = (length - 1) / kPiece - 1; last >= 0; last -= kAhead) {
    float zero[kAhead], decay[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t j = last - k;
      zero[k] = j >= 0 ? behind[j * plane] : 0.f;
      decay[k] = j >= 0 ? exp2_approx(A * sums[j * a.d_inner]) : 0.f;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (last < k) break;
      x = fmaf(decay[k], x, zero[k]);
      behind[(last - k) * plane] = x;
    }
  }
}

template <bool kFromZero>
void launch_carry(const Args& a, const ScanStreamsPlan& plan, cudaStream_t stream) {
  const int64_t pieces = kFromZero ? plan.pieces : plan.pieces - plan.whole;
  const dim3 grid(static_cast<unsigned>(plan.carry_blocks),
                  static_cast<unsigned>(std::min(plan.carry_walkers, pieces)));
  selective_scan_bwd_streams_carry<kFromZero><<<grid, kThreads, 0, stream>>>(a);
  check_launch("selective_scan_bwd_streams_carry");
}

}  // namespace

void scan_streams::find_carries(const Args& a, const ScanStreamsPlan& plan, cudaStream_t stream) {
  if (plan.chain_blocks > 0) {
    launch_carry<true>(a, plan, stream);
    selective_scan_bwd_streams_chain<<<static_cast<unsigned>(plan.chain_blocks),
                                       kScanStreamsChainThreads, 0, stream>>>(
        a, static_cast<int>(plan.chain_blocks / plan.slots));
    check_launch("selective_scan_bwd_streams_chain");
  }
  if (plan.part > 0) launch_carry<false>(a, plan, stream);
}

}  // namespace krait::cuda
