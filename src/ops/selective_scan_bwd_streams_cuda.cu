// The selective scan's backward pass for bf16, 16 states and 32 channels at a time.
//
// A block walks a piece of a sequence from its end to its start with 32 channels; lane = group of
// 4 states * 8 + channel, and what flows back (the carry) stays in registers. Of each tile of 64
// tokens it scans forward once more from the state that the forward pass saved, keeping the states
// before every eighth token; then, eight tokens at a time from the last, it computes A_bar and h
// into registers (8 x 4 of each) and goes back over them. dB and dC sum over channels on the tensor
// cores: the lanes' values are the A operand of an mma whose B operand selects, so that it adds up
// each quad of lanes (tf32: 2^-11, below what bf16 rounds away).
#include "ops/cuda/math.cuh"
#include "ops/cuda/partial_sums.cuh"
#include "ops/cuda/sequences.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/selective_scan_bwd_streams.h"
#include "ops/selective_scan_plan.h"

namespace krait::cuda {
namespace {

constexpr int kTile = static_cast<int>(kScanChunk);
constexpr int kRun = 8;  // tokens that are in registers at a time
constexpr int kRuns = kTile / kRun;
constexpr int kWarps = kScanStreamsWarps;
constexpr int kStates = kScanStreamsStates, kChannels = kScanStreamsChannels;
constexpr int kPiece = static_cast<int>(kScanStreamsPiece);
constexpr int kPart = static_cast<int>(kScanStreamsPart), kParts = kPiece / kPart;
static_assert(kPart % kTile == 0 && kPiece % kPart == 0);
constexpr int kOctet = 8;  // channels of a warp
static_assert(kTile == 64 && kStates == 16 && kWarps == 4);

struct Args {
  const bf16 *u, *dt, *z, *dy, *B, *C;
  bf16 *du, *ddt, *dz, *y;  // y: null when not wanted
  int64_t u_row, dt_row, z_row, dy_row, B_row, C_row, du_row, ddt_row, dz_row, y_row;
  int64_t B_group, C_group;
  const float *A, *D, *dt_bias, *state, *saved;
  float* dstate;
  const int32_t *seq_start, *slot;
  float *dB, *dC;     // (blocks, tokens, 16): sums over the block's channels
  float* dA;          // (walkers, d_inner, 16)
  float* dD_dbias;    // (walkers, 2, d_inner)
  float* behind;      // (slots, d_inner, 16): what flows into a piece from the next one
  float* delta_sums;  // (slots, d_inner): of the next piece
  float*
      behind_last;  // (slots, d_inner, 16): what flows into a long sequence; dstate is overwritten
  float* behind_part;  // (part slots, d_inner, 16): what flows into a part
  int64_t tokens, pieces;
  int num_seqs, d_inner, group_blocks;
  bool parts;
};

// A sequence or a part of one; tokens counted over the batch.
struct Piece {
  int begin, end, seq_begin, sequence;
  int64_t slot;            // of what flows into it, if it is not the last of its sequence
  int64_t state_row;       // of the pool of states
  bool first, last, many;  // of its sequence
};

// The sequences' last pieces come first, so that no multiprocessor gets many of the numbers beyond,
// most of which may stand for nothing.
__device__ bool find_piece(const Args& a, int64_t index, Piece& p) {
  const int32_t* start = a.seq_start;
  int sequence = static_cast<int>(index);
  p.last = index < a.num_seqs;
  if (!p.last)
    sequence = last_not_above(a.num_seqs, index - a.num_seqs,
                              [=](int i) { return int64_t{start[i] / kPiece}; });
  p.seq_begin = start[sequence];
  const int length = start[sequence + 1] - p.seq_begin, last = (length - 1) / kPiece;
  const int64_t slot0 = p.seq_begin / kPiece;
  const int64_t j = p.last ? last : index - a.num_seqs - slot0;
  if (length == 0 || (!p.last && j >= last)) return false;
  p.slot = slot0 + j;
  p.begin = p.seq_begin + static_cast<int>(j) * kPiece;
  p.end = p.last ? p.seq_begin + length : p.begin + kPiece;
  p.first = j == 0;
  p.many = last > 0;
  p.sequence = sequence;
  p.state_row = a.slot ? a.slot[sequence] : sequence;
  return true;
}

// Parts have distinct slots, as the pieces of different sequences do.
__device__ int64_t part_slot(const Piece& p, int begin) { return begin / kPart + p.sequence; }

__device__ bool find_part(Piece& p, int part) {
  p.begin += part * kPart;
  if (p.begin >= p.end) return false;
  p.end = min(p.end, p.begin + kPart);
  p.first = p.first && part == 0;
  return true;
}

// Rows of 64 tokens are 4 floats apart in banks, octets 8: no bank conflicts.
constexpr int kRow = kTile + 4, kKind = kOctet * kRow;
enum Kind { kDelta, kDeltaU, kDy, kKinds, kQ = kDeltaU, kW = kDy };  // q, w replace delta u, dy
constexpr int kOctetRows = kKinds * kKind + 8;
constexpr int kLaneStates = 32 * 4;                          // floats: four states of each lane
constexpr int kOctetStates = (kRuns - 1) * kLaneStates + 8;  // before runs 1 to 7
constexpr int kFirstY = kOctetStates - 8 - kTile * kOctet;   // y takes the place of states in use
struct Shared {
  float sums[2][kWarps][kRun][2 * kStates];  // dB, dC of a run, by warp; two take turns
  float bc[kTile][2 * kStates];              // B, C
  float states[kWarps][kOctetStates];
  float rows[kWarps][kOctetRows];
};
static_assert(kScanStreamsBlocks * (sizeof(Shared) + 1024) <= 228 * 1024);

// Halves the values that a lane holds by adding those of the lane across `bit`: the lane with the
// bit set keeps the upper half.
template <int N>
__device__ __forceinline__ void fold(float* v, int bit) {
  const bool upper = threadIdx.x & static_cast<unsigned>(bit);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float keep = upper ? v[i + N / 2] : v[i], give = upper ? v[i] : v[i + N / 2];
    v[i] = keep + __shfl_xor_sync(~0u, give, bit);
  }
}

// Shared memory by address. The address is pinned in its register: else it is computed afresh
// wherever it is needed, a tenth of all instructions.
__device__ __forceinline__ uint32_t pinned_address(const void* p) {
  auto address = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("" : "+r"(address));
  return address;
}
__device__ __forceinline__ void load4(float (&v)[4], uint32_t base, int offset) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(base + static_cast<uint32_t>(offset) * 4));
}
__device__ __forceinline__ float2 load2(uint32_t base, int offset) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(base + static_cast<uint32_t>(offset) * 4));
  return v;
}
__device__ __forceinline__ void store4(uint32_t base, int offset, const float (&v)[4]) {
  asm volatile(
      "st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(base + static_cast<uint32_t>(offset) * 4),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]));
}
__device__ __forceinline__ void store2(uint32_t base, int offset, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(base + static_cast<uint32_t>(offset) * 4),
               "f"(x), "f"(y));
}

// d += a b: a is 16 x 8 (a0: row lane / 4, column lane % 4; a1: row + 8; a2, a3: column + 4), b 8 x
// 8 (b0: row lane % 4, column lane / 4; b1: row + 4).
__device__ __forceinline__ void mma(float (&d)[4], float a0, float a1, float a2, float a3, float b0,
                                    float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// d softplus(x) / dx = 1 - exp(-delta), without cancellation for small delta.
__device__ __forceinline__ float softplus_slope(float delta) {
  const float small = delta * (1.f - delta * (0.5f - delta * (1.f / 6 - delta * (1.f / 24))));
  return delta < 0.06f ? small : 1.f - exp2_approx(-kLog2E * delta);
}

__device__ const float kZeroStates[4] = {};

struct Block {
  const Args& a;
  Shared& sh;
  int lane, channel;  // channel: the lane's
  int64_t state_at;   // of the lane's states in (d_inner, 16)
  // As a mover of tiles: a thread moves the octet's channels of tokens t and t + 32.
  int mover_octet, mover_token, mover_channel;
  uint32_t rows, states, y, bc;  // the lane's places
  uint32_t sums, summed;         // where the lane leaves dB, dC; what the thread adds up
  float* partial;                // where the thread puts its sum
  float select[8];
  float A[4], carry[4], dA[4] = {};
  float dD = 0, dbias = 0;

  __device__ __forceinline__ Block(const Args& args, Shared& shared) : a(args), sh(shared) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
    const int block = static_cast<int>(blockIdx.x);
    lane = thread % 32;
    const int group = lane / kOctet, i = lane % kOctet;
    channel = block * kChannels + warp * kOctet + i;
    state_at = int64_t{channel} * kStates + group * 4;
    mover_octet = thread % kWarps, mover_token = thread / kWarps;
    mover_channel = block * kChannels + mover_octet * kOctet;
    rows = pinned_address(&sh.rows[warp][i * kRow]);
    states = pinned_address(&sh.states[warp][lane * 4]);
    y = pinned_address(&sh.states[warp][kFirstY + i * kRun + group * 2]);
    bc = pinned_address(&sh.bc[0][group * 4]);
    // Of the mma's output a lane has token lane % 4 / 2 of two, states lane % 2 * 2 + {0, 1}; after
    // quads are added up, of dC if bit 2 is set, else dB. Odd tokens lie swapped: bank conflicts.
    const int odd = lane % 4 / 2, is_dC = lane / 4 % 2;
    sums = pinned_address(
        &sh.sums[0][warp][odd][(is_dC * kStates + group * 4 + lane % 2 * 2) ^ (odd * 8)]);
    const int token = thread / kStates, n = thread % kStates * 2;
    summed = pinned_address(&sh.sums[0][0][token][n ^ (token % 2 * 8)]);
    partial = (n < kStates ? a.dB : a.dC) + (block * a.tokens + token) * kStates + n % kStates;
#pragma unroll
    for (int v = 0; v < 8; ++v) select[v] = lane / 4 == v ? 1.f : 0.f;
    const float4 A4 = *reinterpret_cast<const float4*>(a.A + state_at);
    A[0] = A4.x * kLog2E, A[1] = A4.y * kLog2E, A[2] = A4.z * kLog2E, A[3] = A4.w * kLog2E;
  }

  // Runs take turns in sh.sums, so that one barrier a run is enough.
  static __device__ uint32_t turn(int j) {
    return j % 2 * static_cast<uint32_t>(sizeof(Shared::sums) / 2);
  }
  __device__ int64_t plane() const { return int64_t{a.d_inner} * kStates; }

  // B and C of the tile, zero where there is no token.
  __device__ __forceinline__ void fetch_bc(int t0, int tokens) const {
    const int thread = static_cast<int>(threadIdx.x), part = thread % 8, n = part % 4 * 4;
    const int group = static_cast<int>(blockIdx.x) / a.group_blocks;
    const bf16* from = part < 4 ? a.B + group * a.B_group : a.C + group * a.C_group;
    const int64_t row = part < 4 ? a.B_row : a.C_row;
    Packed<bf16, 4> x[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int t = thread / 8 + k * 16;
      if (t < tokens) x[k] = load_packed<4>(from + (int64_t{t0} + t) * row + n);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Floats<4> f = unpack(x[k]);
      *reinterpret_cast<float4*>(&sh.bc[thread / 8 + k * 16][part * 4]) =
          make_float4(f[0], f[1], f[2], f[3]);
    }
  }

  // delta, delta u and dy silu(z), zero where there is no token: that leaves states and gradients
  // as they are.
  template <bool kCarryOnly>
  __device__ __forceinline__ void fetch_rows(int t0, int tokens) const {
#pragma unroll 1
    for (int t = mover_token; t < kTile; t += kTile / 2) {
      float* to = &sh.rows[mover_octet][t];
      if (t >= tokens) {
#pragma unroll
        for (int i = 0; i < kOctet; ++i)
          to[i * kRow] = to[i * kRow + kKind] = to[i * kRow + 2 * kKind] = 0;
        continue;
      }
      const int64_t token = t0 + t;
      const auto dt = load_packed<8>(a.dt + token * a.dt_row + mover_channel);
      const auto z = load_packed<8>(a.z + token * a.z_row + mover_channel);
      const auto dy = load_packed<8>(a.dy + token * a.dy_row + mover_channel);
      Packed<bf16, 8> u{};
      if (!kCarryOnly) u = load_packed<8>(a.u + token * a.u_row + mover_channel);
      const Floats<8> bias = a.dt_bias ? load_vector<8>(a.dt_bias + mover_channel) : constant<8>(0);
      const Floats<8> dts = unpack(dt), us = unpack(u), zs = unpack(z), dys = unpack(dy);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const float delta = softplus(dts[i] + bias[i]);
        to[i * kRow + kDelta * kKind] = delta;
        if (!kCarryOnly) to[i * kRow + kDeltaU * kKind] = delta * us[i];
        to[i * kRow + kDy * kKind] = dys[i] * silu(zs[i]);
      }
    }
  }

  __device__ const float4* states_before(const Piece& p, int t0) const {
    const float* from = t0 > p.seq_begin ? a.saved + (t0 / kTile - 1) * plane() + state_at
                        : a.state        ? a.state + p.state_row * plane() + state_at
                                         : kZeroStates;
    return reinterpret_cast<const float4*>(from);
  }

  // From h before the tile to h before its last run, leaving those between in shared memory.
  __device__ __forceinline__ void scan_to_last_run(float (&h)[4], int last) const {
#pragma unroll 1
    for (int j = 0; j < last; ++j) {
      const uint32_t row = rows + j * kRun * 4, bc_run = bc + j * kRun * 2 * kStates * 4;
      if (j > 0) store4(states + j * kLaneStates * 4, -kLaneStates, h);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float delta[4], x[4];
        load4(delta, row, half * 4);
        load4(x, row, kDeltaU * kKind + half * 4);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float B[4];
          load4(B, bc_run, (half * 4 + k) * 2 * kStates);
#pragma unroll
          for (int s = 0; s < 4; ++s) h[s] = fmaf(exp2_approx(delta[k] * A[s]), h[s], x[k] * B[s]);
        }
      }
    }
    if (last > 0) store4(states + last * kLaneStates * 4, -kLaneStates, h);
  }

  // A_bar and h of a run, and y.
  __device__ __forceinline__ void run_forward(int j, const float (&before)[4],
                                              float (&a_bar)[kRun][4], float (&h)[kRun][4]) const {
    const uint32_t row = rows + j * kRun * 4, bc_run = bc + j * kRun * 2 * kStates * 4;
    float sum[kRun];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float delta[4], x[4];
      load4(delta, row, half * 4);
      load4(x, row, kDeltaU * kKind + half * 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int t = half * 4 + k;
        float B[4], C[4];
        load4(B, bc_run, t * 2 * kStates);
        load4(C, bc_run, t * 2 * kStates + kStates);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          a_bar[t][s] = exp2_approx(delta[k] * A[s]);
          h[t][s] = fmaf(a_bar[t][s], t == 0 ? before[s] : h[t > 0 ? t - 1 : 0][s], x[k] * B[s]);
          sum[t] = s == 0 ? C[s] * h[t][s] : fmaf(C[s], h[t][s], sum[t]);
        }
      }
    }
    fold<8>(sum, 16), fold<4>(sum, 8);
    store2(y + j * kRun * kOctet * 4, 0, sum[0], sum[1]);
  }

  // One token of the way back. dB: dh delta u; dC: dy h; q: sum of dh B; w: sum of dh A_bar h A.
  struct Token {
    float delta, x, dy;
    float dB[4], dC[4];
  };
  __device__ __forceinline__ void token_back(Token& t, uint32_t bc_token, const float (&a_bar)[4],
                                             const float (&h)[4], const float (&before)[4],
                                             float& q, float& w) {
    float B[4], C[4];
    load4(B, bc_token, 0);
    load4(C, bc_token, kStates);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const float dh = fmaf(t.dy, C[s], carry[s]);
      t.dB[s] = dh * t.x;
      t.dC[s] = t.dy * h[s];
      q = s == 0 ? dh * B[s] : fmaf(dh, B[s], q);
      carry[s] = dh * a_bar[s];
      const float decayed = carry[s] * before[s];
      w = s == 0 ? decayed * A[s] : fmaf(decayed, A[s], w);
      dA[s] = fmaf(decayed, t.delta, dA[s]);
    }
  }

  __device__ __forceinline__ void run_back(int j, const float (&before)[4],
                                           const float (&a_bar)[kRun][4],
                                           const float (&h)[kRun][4]) {
    const uint32_t row = rows + j * kRun * 4, bc_run = bc + j * kRun * 2 * kStates * 4;
    float q[kRun], w[kRun];
#pragma unroll
    for (int half = 1; half >= 0; --half) {
      float delta[4], x[4], dy[4];
      load4(delta, row, half * 4);
      load4(x, row, kDeltaU * kKind + half * 4);
      load4(dy, row, kDy * kKind + half * 4);
#pragma unroll
      for (int pair = 1; pair >= 0; --pair) {
        float d[4] = {};  // rows: quads of lanes, dB above dC; columns: states of both tokens
#pragma unroll
        for (int odd = 1; odd >= 0; --odd) {
          const int k = pair * 2 + odd, t = half * 4 + k;
          Token token = {.delta = delta[k], .x = x[k], .dy = dy[k]};
          token_back(token, bc_run + t * 2 * kStates * 4, a_bar[t], h[t],
                     t == 0 ? before : h[t > 0 ? t - 1 : 0], q[t], w[t]);
          const float* one = select + 4 * odd;
          mma(d, token.dB[0], token.dC[0], token.dB[1], token.dC[1], one[0], one[1]);
          mma(d, token.dB[2], token.dC[2], token.dB[3], token.dC[3], one[2], one[3]);
        }
        const bool is_dC = lane & 4;  // two quads have the same states
        const float keep0 = is_dC ? d[2] : d[0], keep1 = is_dC ? d[3] : d[1];
        const float give0 = is_dC ? d[0] : d[2], give1 = is_dC ? d[1] : d[3];
        store2(sums + turn(j), (half * 4 + pair * 2) * 2 * kStates,
               keep0 + __shfl_xor_sync(~0u, give0, 4), keep1 + __shfl_xor_sync(~0u, give1, 4));
      }
    }
    fold<8>(q, 16), fold<4>(q, 8);
    fold<8>(w, 16), fold<4>(w, 8);
    __syncwarp();  // delta u and dy of the run have been read
    store2(row + lane / kOctet * 8, kQ * kKind, q[0], q[1]);
    store2(row + lane / kOctet * 8, kW * kKind, w[0], w[1]);
  }

  // dB, dC of the run: over the warps.
  __device__ __forceinline__ void add_warps(int t0, int j, int tokens) {
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int k = 0; k < kWarps; ++k) {
      const float2 v = load2(summed + turn(j), k * kRun * 2 * kStates);
      sum.x += v.x, sum.y += v.y;
    }
    const int t = j * kRun;
    if (t + static_cast<int>(threadIdx.x) / kStates < tokens)
      *reinterpret_cast<float2*>(partial + int64_t{t0 + t} * kStates) = sum;
  }

  // du, ddt, dz and y of the tile, from q, w and y.
  __device__ __forceinline__ void store_rows(int t0, int tokens) {
    float dDs[kOctet] = {}, dbiases[kOctet] = {};
#pragma unroll 1
    for (int t = mover_token; t < tokens; t += kTile / 2) {
      const int64_t token = t0 + t;
      const Floats<8> us = load_vector<8>(a.u + token * a.u_row + mover_channel);
      const Floats<8> zs = load_vector<8>(a.z + token * a.z_row + mover_channel);
      const Floats<8> dys = load_vector<8>(a.dy + token * a.dy_row + mover_channel);
      const Floats<8> Ds = a.D ? load_vector<8>(a.D + mover_channel) : constant<8>(0);
      const float* row = &sh.rows[mover_octet][t];
      const float* ys = &sh.states[mover_octet][kFirstY + t / kRun * kRun * kOctet + t % kRun];
      Floats<8> du, ddt, dz, y_out;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const float delta = row[i * kRow + kDelta * kKind], q = row[i * kRow + kQ * kKind],
                    w = row[i * kRow + kW * kKind];
        const float before_gate = fmaf(Ds[i], us[i], ys[i * kRun]);
        const float s = sigmoid(zs[i]), gate = zs[i] * s, dy = dys[i] * gate;
        du[i] = fmaf(q, delta, dy * Ds[i]);
        ddt[i] = fmaf(q, us[i], w * kLn2) * softplus_slope(delta);
        dz[i] = dys[i] * before_gate * fmaf(gate, 1.f - s, s);
        y_out[i] = before_gate * gate;
        dDs[i] = fmaf(dy, us[i], dDs[i]);
        dbiases[i] += ddt[i];
      }
      store_vector(a.du + token * a.du_row + mover_channel, du);
      store_vector(a.ddt + token * a.ddt_row + mover_channel, ddt);
      store_vector(a.dz + token * a.dz_row + mover_channel, dz);
      if (a.y) store_vector(a.y + token * a.y_row + mover_channel, y_out);
    }
    fold<8>(dDs, 16), fold<4>(dDs, 8), fold<2>(dDs, 4);
    fold<8>(dbiases, 16), fold<4>(dbiases, 8), fold<2>(dbiases, 4);
    dD += dDs[0], dbias += dbiases[0];  // of the mover's channel lane / 4
  }

  __device__ __forceinline__ void load_carry(const float* from) {
    float4 x = make_float4(0, 0, 0, 0);
    if (from) x = *reinterpret_cast<const float4*>(from + state_at);
    carry[0] = x.x, carry[1] = x.y, carry[2] = x.z, carry[3] = x.w;
  }
  __device__ __forceinline__ void store_carry(float* to) const {
    *reinterpret_cast<float4*>(to + state_at) = make_float4(carry[0], carry[1], carry[2], carry[3]);
  }
  // Where what flows into the piece stands.
  __device__ const float* flows_in(const Piece& p) const {
    if (!p.last) return a.behind + p.slot * plane();
    if (p.many) return a.behind_last + p.seq_begin / kPiece * plane();
    return a.dstate ? a.dstate + p.state_row * plane() : nullptr;
  }

  __device__ __forceinline__ void gradients(const Piece& p) {
    load_carry(a.parts ? a.behind_part + part_slot(p, p.begin) * plane() : flows_in(p));
#pragma unroll 1
    for (int t0 = p.begin + (p.end - p.begin - 1) / kTile * kTile; t0 >= p.begin; t0 -= kTile) {
      const int tokens = min(kTile, p.end - t0), last = (tokens - 1) / kRun;
      fetch_bc(t0, tokens);
      fetch_rows<false>(t0, tokens);
      float h[4];
      const float4* const first = states_before(p, t0);
      const auto take = [&h](const float4& x) { h[0] = x.x, h[1] = x.y, h[2] = x.z, h[3] = x.w; };
      take(*first);
      __syncthreads();  // B, C and rows are there; every y of the last tile has been read
      scan_to_last_run(h, last);
#pragma unroll 1
      for (int j = last; j >= 0; --j) {
        if (j == 0)
          take(*first);
        else if (j < last)
          load4(h, states + j * kLaneStates * 4, -kLaneStates);
        float a_bar[kRun][4], hs[kRun][4];
        run_forward(j, h, a_bar, hs);
        run_back(j, h, a_bar, hs);
        __syncthreads();  // every warp's dB, dC, q, w and y are there
        add_warps(t0, j, tokens);
      }
      store_rows(t0, tokens);
    }
    if (a.dstate && p.first) store_carry(a.dstate + p.state_row * plane());
    __syncthreads();  // the last tile has been stored
  }

  // What flows back through a tile; adds to the sum of delta.
  __device__ __forceinline__ void carry_through(int t0, int tokens, float& sum) {
    __syncthreads();  // the last tile has been read
    fetch_bc(t0, tokens);
    fetch_rows<true>(t0, tokens);
    __syncthreads();  // C and rows are there
#pragma unroll 1
    for (int t = (tokens - 1) / 4 * 4; t >= 0; t -= 4) {
      float delta[4], dy[4];
      load4(delta, rows + t * 4, kDelta * kKind);
      load4(dy, rows + t * 4, kDy * kKind);
#pragma unroll
      for (int k = 3; k >= 0; --k) {
        float C[4];
        load4(C, bc + t * 2 * kStates * 4, k * 2 * kStates + kStates);
        sum += delta[k];
#pragma unroll
        for (int s = 0; s < 4; ++s)
          carry[s] = fmaf(dy[k], C[s], carry[s]) * exp2_approx(delta[k] * A[s]);
      }
    }
  }

  // What flows out of a piece if nothing flows in, and the sum of delta; into the slot of the piece
  // before it.
  __device__ __forceinline__ void carry_from_zero(const Piece& p) {
    float sum = 0;
    load_carry(nullptr);
#pragma unroll 1
    for (int t0 = p.begin + (p.end - p.begin - 1) / kTile * kTile; t0 >= p.begin; t0 -= kTile)
      carry_through(t0, min(kTile, p.end - t0), sum);
    store_carry(a.behind + (p.slot - 1) * plane());
    if (lane < kOctet) a.delta_sums[(p.slot - 1) * a.d_inner + channel] = sum;
  }

  // What flows into the parts of a piece: the bits that come by when it is walked as a whole.
  __device__ __forceinline__ void carry_into_parts(const Piece& p) {
    float sum = 0;
    load_carry(flows_in(p));
    int part = p.begin + (p.end - p.begin - 1) / kPart * kPart;
    store_carry(a.behind_part + part_slot(p, part) * plane());
#pragma unroll 1
    for (int t0 = p.begin + (p.end - p.begin - 1) / kTile * kTile; t0 > p.begin; t0 -= kTile) {
      carry_through(t0, min(kTile, p.end - t0), sum);
      if (t0 > part) continue;
      part -= kPart;
      store_carry(a.behind_part + part_slot(p, part) * plane());
    }
  }

  __device__ __forceinline__ void store_sums() {
    *reinterpret_cast<float4*>(a.dA + blockIdx.y * plane() + state_at) =
        make_float4(dA[0], dA[1], dA[2], dA[3]);
    float* all = sh.rows[0];
    const int warp = static_cast<int>(threadIdx.x) / 32, i = lane % 4 * kOctet + lane / 4;
    all[warp * 2 * kChannels + i] = dD;
    all[warp * 2 * kChannels + kChannels + i] = dbias;
    __syncthreads();  // every warp's sums are there
    const int k = static_cast<int>(threadIdx.x);
    if (k >= 2 * kChannels) return;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += all[w * 2 * kChannels + k];
    a.dD_dbias[(int64_t{blockIdx.y} * 2 + k / kChannels) * a.d_inner + blockIdx.x * kChannels +
               k % kChannels] = sum;
  }
};

enum class Pass { kFromZero, kIntoParts, kGradients };

// Grid: plan.blocks x plan.walkers. kFromZero comes first where sequences may be long, kIntoParts
// where blocks are few. kGradients must move 15 bytes an element (8 more for the sums of dB and dC)
// but is bound by its 480 instructions an element, 16 warps on a multiprocessor at 2.6 a clock:
// with all other passes 2.72 ms at (32, 1536, 2048) on an H200, 37 G elements/s, where all issue
// slots would give 66.
template <Pass kPass>
__global__ void __launch_bounds__(kScanStreamsThreads, kScanStreamsBlocks)
    selective_scan_bwd_streams_walk(const __grid_constant__ Args a) {
  extern __shared__ char memory[];
  Block block(a, *reinterpret_cast<Shared*>(memory));
  const int parts = kPass == Pass::kGradients && a.parts ? kParts : 1;
#pragma unroll 1
  for (int64_t index = blockIdx.y; index < a.pieces * parts; index += gridDim.y) {
    Piece p;
    if (!find_piece(a, index / parts, p)) continue;
    if constexpr (kPass == Pass::kFromZero) {
      if (!p.first) block.carry_from_zero(p);
    } else if constexpr (kPass == Pass::kIntoParts) {
      block.carry_into_parts(p);
    } else {
      if (a.parts && !find_part(p, static_cast<int>(index % parts))) continue;
      block.gradients(p);
    }
  }
  if constexpr (kPass == Pass::kGradients) block.store_sums();
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
  const int64_t plane = int64_t{a.d_inner} * kStates;
  const int64_t i = int64_t{blockIdx.x % blocks_per_slot} * kScanStreamsChainThreads + threadIdx.x;
  const int begin = start[sequence], length = start[sequence + 1] - begin;
  if (begin / kPiece != slot) return;
  if (i >= plane || length <= kPiece) return;
  float* behind = a.behind + begin / kPiece * plane + i;
  const float* sums = a.delta_sums + int64_t{begin / kPiece} * a.d_inner + i / kStates;
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

struct Sum {
  const float* partial;  // (groups * group_blocks, tokens, 16)
  bf16* out;
  int64_t row, group_stride;
};

// dB (grid.y 0) and dC (1) from the blocks' sums. A thread has four states of a token and group.
__global__ void __launch_bounds__(256)
    selective_scan_bwd_streams_add(const Sum dB, const Sum dC, int64_t tokens, int groups,
                                   int group_blocks) {
  const Sum& s = blockIdx.y ? dC : dB;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= tokens * groups * 4) return;
  const int n = static_cast<int>(i % 4) * 4, group = static_cast<int>(i / 4 % groups);
  const int64_t t = i / 4 / groups;
  const float* from = s.partial + (group * group_blocks * tokens + t) * kStates + n;
  Floats<4> sum = constant<4>(0);
#pragma unroll 8
  for (int b = 0; b < group_blocks; ++b) {
    const Floats<4> x = load_vector<4>(from + b * tokens * kStates);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += x[k];
  }
  store_vector(s.out + t * s.row + group * s.group_stride + n, sum);
}

struct AddTo {
  float *first, *second;  // null: not wanted
  int64_t count;          // of each
  __device__ void operator()(int64_t i, float sum) const {
    float* to = i < count ? first : second;
    if (to) to[i < count ? i : i - count] += sum;
  }
};

Args arguments(const SelectiveScan& op, const SelectiveScanGrad& grad) {
  Args a{};
  const auto bind = [](const Tensor& t, auto*& p, int64_t& row) {
    p = t ? t.ptr<bf16>() : nullptr;
    row = t ? t.stride[0] : 0;
  };
  bind(op.u, a.u, a.u_row), bind(op.dt, a.dt, a.dt_row), bind(op.z, a.z, a.z_row);
  bind(op.B, a.B, a.B_row), bind(op.C, a.C, a.C_row), bind(grad.dy, a.dy, a.dy_row);
  bind(grad.du, a.du, a.du_row), bind(grad.ddt, a.ddt, a.ddt_row);
  bind(grad.dz, a.dz, a.dz_row), bind(grad.y, a.y, a.y_row);
  a.B_group = op.B.stride[1], a.C_group = op.C.stride[1];
  const auto f32 = [](const Tensor& t) { return t ? t.ptr<float>() : nullptr; };
  a.A = f32(op.A), a.D = f32(op.D), a.dt_bias = f32(op.dt_bias);
  a.state = f32(op.state), a.saved = f32(op.saved), a.dstate = f32(grad.dstate);
  a.seq_start = op.seq_start.ptr<int32_t>();
  a.slot = op.slot ? op.slot.ptr<int32_t>() : nullptr;
  a.tokens = op.u.shape[0];
  a.num_seqs = static_cast<int>(op.seq_start.shape[0] - 1);
  a.d_inner = static_cast<int>(op.u.shape[1]);
  a.group_blocks = static_cast<int>(op.u.shape[1] / op.B.shape[1] / kChannels);
  return a;
}

bool aligned(const Tensor& t) { return !t || reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

template <Pass kPass>
void walk(const Args& a, int64_t blocks, int64_t walkers, cudaStream_t stream) {
  const auto kernel = selective_scan_bwd_streams_walk<kPass>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
        "preparing selective_scan_bwd_streams_walk");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(walkers));
  kernel<<<grid, kScanStreamsThreads, sizeof(Shared), stream>>>(a);
  check_launch("selective_scan_bwd_streams_walk");
}

}  // namespace

bool scan_streams_apply(const SelectiveScan& op, const SelectiveScanGrad& grad) {
  if (op.u.dtype != DType::bf16 || op.A.shape[1] != kStates || !op.z) return false;
  if (op.u.shape[1] / op.B.shape[1] % kChannels != 0) return false;
  for (const Tensor* t : {&op.u, &op.dt, &op.z, &grad.dy, &grad.du, &grad.ddt, &grad.dz, &grad.y})
    if (!vector_rows(*t, 8)) return false;
  for (const Tensor* t : {&op.B, &op.C, &grad.dB, &grad.dC})
    if (!vector_rows(*t, 4)) return false;
  for (const Tensor* t : {&op.A, &op.D, &op.dt_bias, &op.state, &op.saved, &grad.dstate})
    if (!aligned(*t)) return false;
  return true;
}

void selective_scan_bwd_streams(Context& ctx, const SelectiveScan& op,
                                const SelectiveScanGrad& grad) {
  State& gpu = state_of(ctx);
  Args a = arguments(op, grad);
  const int groups = static_cast<int>(op.B.shape[1]);
  const ScanStreamsPlan plan =
      plan_scan_streams(a.tokens, a.num_seqs, a.d_inner, gpu.multiprocessors);
  Arena& work = ctx.workspace();
  const int64_t plane = int64_t{a.d_inner} * kStates, partial = plan.blocks * a.tokens * kStates;
  a.pieces = plan.pieces;
  a.dB = work.array<float>(partial), a.dC = work.array<float>(partial);
  a.dA = work.array<float>(plan.walkers * plane);
  a.dD_dbias = work.array<float>(plan.walkers * 2 * a.d_inner);
  a.parts = plan.parts;
  if (plan.chain_blocks > 0) {
    a.behind = work.array<float>(plan.slots * plane);
    a.behind_last = work.array<float>(plan.slots * plane);
    a.delta_sums = work.array<float>(plan.slots * a.d_inner);
    walk<Pass::kFromZero>(a, plan.blocks, plan.piece_walkers, gpu.stream);
    selective_scan_bwd_streams_chain<<<static_cast<unsigned>(plan.chain_blocks),
                                       kScanStreamsChainThreads, 0, gpu.stream>>>(
        a, static_cast<int>(plan.chain_blocks / plan.slots));
    check_launch("selective_scan_bwd_streams_chain");
  }
  if (plan.parts) {
    a.behind_part = work.array<float>(plan.part_slots * plane);
    walk<Pass::kIntoParts>(a, plan.blocks, plan.piece_walkers, gpu.stream);
  }
  walk<Pass::kGradients>(a, plan.blocks, plan.walkers, gpu.stream);

  const auto sum = [](const float* from, const Tensor& out) {
    return Sum{from, out.ptr<bf16>(), out.stride[0], out.stride[1]};
  };
  const auto blocks = static_cast<unsigned>((a.tokens * groups * 4 + 255) / 256);
  selective_scan_bwd_streams_add<<<dim3(blocks, 2), 256, 0, gpu.stream>>>(
      sum(a.dB, grad.dB), sum(a.dC, grad.dC), a.tokens, groups, a.group_blocks);
  check_launch("selective_scan_bwd_streams_add");
  const auto f32 = [](const Tensor& t) { return t ? t.ptr<float>() : nullptr; };
  launch_add_partial_sums(gpu.stream, a.dA, plan.walkers, plane,
                          AddTo{f32(grad.dA), nullptr, plane});
  launch_add_partial_sums(gpu.stream, a.dD_dbias, plan.walkers, int64_t{2} * a.d_inner,
                          AddTo{f32(grad.dD), f32(grad.ddt_bias), a.d_inner});
}

}  // namespace krait::cuda
