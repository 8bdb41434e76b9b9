// Selective scan on the GPU, forward. One kernel scans tiles of tokens that lie in shared memory;
// where sequences are few and long, their segments (selective_scan_plan.h) are scanned side by side
// by three kernels.
#include "core/dtype.h"
#include "ops/cuda/math.cuh"
#include "ops/cuda/sequences.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/engine.h"
#include "ops/selective_scan_plan.h"

namespace krait::cuda {
namespace {

struct Args {
  const void *u, *dt, *z, *B, *C;  // z: null without a gate
  void* y;
  int64_t u_row, dt_row, z_row, B_row, C_row, y_row;  // in elements
  int64_t B_group, C_group;
  const float *A, *D, *dt_bias;  // D, dt_bias: null when none
  float *state, *saved;          // null when none
  float* start_states;           // (slots of segments, d_inner, d_state)
  float* delta_sums;             // (slots of segments, d_inner)
  const int32_t *seq_start, *slot;
  int num_seqs, d_inner, d_state;
  int group_width, group_blocks, channel_blocks;
  bool vector_rows;    // u, dt, z, y may be read four channels at a time
  bool vector_states;  // B and C likewise
  bool vector_saved;   // A, state, saved likewise
};

// What a block's piece is. ends: a segment but the last of its sequence, from zero (the first: from
// the sequence's state); its final state and its sum of delta are kept. segments: a segment from
// its start state.
enum class Mode { sequences, ends, segments };

struct Piece {
  int64_t begin, end;          // its tokens
  int64_t seq_begin, seq_end;  // its sequence's
  int64_t segment_slot;
  int sequence;
};

__device__ Piece find_piece(const Args& a, Mode mode, int64_t index) {
  Piece p{};
  p.segment_slot = index;
  const int32_t* start = a.seq_start;
  p.sequence = static_cast<int>(index);
  if (mode != Mode::sequences)
    p.sequence =
        last_not_above(a.num_seqs, index, [=](int i) { return scan_segment_slots(start[i], i); });
  p.seq_begin = p.begin = start[p.sequence];
  p.seq_end = p.end = start[p.sequence + 1];
  if (mode == Mode::sequences) return p;
  p.begin += (index - scan_segment_slots(p.seq_begin, p.sequence)) * kScanSegment;
  p.end = min(p.begin + kScanSegment, p.seq_end);
  if (mode == Mode::ends && p.end == p.seq_end) p.end = p.begin;  // nobody starts from its end
  return p;
}

// Up to four neighbouring elements, `count` of them there.
template <class T>
__device__ Packed<T, 4> load_quad(const T* p, int count, bool vector) {
  Packed<T, 4> out{};
  if (vector) {
    if (count > 0) out = load_packed<4>(p);
    return out;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) {
      const uint32_t word = load_packed<1>(p + i).word[0];
      if constexpr (sizeof(T) == 4)
        out.word[i] = word;
      else
        out.word[i / 2] |= word << (i % 2 * 16);
    }
  return out;
}

template <class T>
__device__ void store_quad(T* p, const Floats<4>& x, int count, bool vector) {
  if (vector) {
    if (count > 0) store_vector<4>(p, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) store_vector<1>(p + i, Floats<1>{{x[i]}});
}

// A lane's states of one channel in memory of (.., d_inner, d_state).
template <int S>
__device__ void load_states(float (&h)[S], const float* p, int count, bool vector) {
#pragma unroll
  for (int s = 0; s < S; ++s) h[s] = 0;
  if (S % 4 == 0 && vector) {
#pragma unroll
    for (int s = 0; s + 3 < S; s += 4)
      if (s < count) {
        const float4 x = *reinterpret_cast<const float4*>(p + s);
        h[s] = x.x, h[s + 1] = x.y, h[s + 2] = x.z, h[s + 3] = x.w;
      }
    return;
  }
#pragma unroll
  for (int s = 0; s < S; ++s)
    if (s < count) h[s] = p[s];
}

template <int S>
__device__ void store_states(float* p, const float (&h)[S], int count, bool vector) {
  if (S % 4 == 0 && vector) {
#pragma unroll
    for (int s = 0; s + 3 < S; s += 4)
      if (s < count)
        *reinterpret_cast<float4*>(p + s) = make_float4(h[s], h[s + 1], h[s + 2], h[s + 3]);
    return;
  }
#pragma unroll
  for (int s = 0; s < S; ++s)
    if (s < count) p[s] = h[s];
}

template <int S>
__device__ float sum_of_pairs(const float (&h)[S], const float (&c)[S]) {
  float p[S / 2];
#pragma unroll
  for (int i = 0; i < S / 2; ++i) p[i] = fmaf(c[2 * i + 1], h[2 * i + 1], c[2 * i] * h[2 * i]);
#pragma unroll
  for (int width = S / 2; width > 1; width /= 2)
#pragma unroll
    for (int i = 0; i < width / 2; ++i) p[i] = p[2 * i] + p[2 * i + 1];
  return p[0];
}

// Sums of y[0..3] over a channel's L lanes, as a tree over neighbours: lane i gets that of token i
// % 4.
template <int L>
__device__ float sum_lanes(const float (&y)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const float even_tokens = odd ? y[1] : y[0], give0 = odd ? y[0] : y[1];
  const float odd_tokens = odd ? y[3] : y[2], give1 = odd ? y[2] : y[3];
  const float low = even_tokens + __shfl_xor_sync(~0u, give0, 1);  // token 0 or 1
  const float up = odd_tokens + __shfl_xor_sync(~0u, give1, 1);    // token 2 or 3
  float sum = (high ? up : low) + __shfl_xor_sync(~0u, high ? low : up, 2);
#pragma unroll
  for (int d = 4; d < L; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return sum;
}

template <class T, int L, int S, int kChannels, bool kOutput>
struct Tile {
  static constexpr int kThreads = L * kChannels, kStates = L * S;
  static constexpr int kTokens = kStates > 64 ? 16 : 32;
  static constexpr int kQuads = kChannels / 4;  // of channels, in a row
  static constexpr int kRowsAtOnce = kThreads / kQuads;
  static constexpr int kItems = (kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kVectors = kOutput ? 2 : 1;  // B, and C when there is output
  static constexpr int kStateQuads = kVectors * kStates / 4;
  static constexpr int kStateItems = (kTokens * kStateQuads + kThreads - 1) / kThreads;
  static constexpr int kStateRow = kVectors * kStates;
  static constexpr int kYRow = kChannels + (L == 4 ? 8 : 4);  // no two of a warp's y in one bank

  // Kept by every thread for its kItems quads of channels: this tile's u and z, until y is there,
  // and all of the next tile's inputs, which are fetched while this one is scanned.
  struct Raw {
    Packed<T, 4> u[kItems], dt[kItems], z[kItems], bc[kStateItems];
  };
  struct Shared {
    float2 delta[kTokens][kChannels];  // delta, delta u
    float bc[kTokens][kStateRow];      // see place()
    float y[kOutput ? kTokens : 1][kYRow];
  };

  // Where the quad of states n.. of B (which = 0) or C (1) lies in a row of Shared::bc, so that a
  // warp's 16-byte reads touch each bank once. S = 2: B and C of a lane side by side.
  static __device__ int place(int which, int n) {
    if constexpr (S >= 4)
      return ((which * (S / 4) + n % S / 4) * L + n / S) * 4;
    else
      return n * kVectors + which * 2;
  }

  static __device__ void fetch(Raw& raw, const Args& a, int64_t t0, int64_t end, int c, int c_end,
                               int group) {
    const int row = threadIdx.x / kQuads, count = c_end - c;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t t = t0 + row + i * kRowsAtOnce;
      const bool there = t < end && row + i * kRowsAtOnce < kTokens;
      const int n = there ? count : 0;
      raw.u[i] = load_quad(static_cast<const T*>(a.u) + t * a.u_row + c, n, a.vector_rows);
      raw.dt[i] = load_quad(static_cast<const T*>(a.dt) + t * a.dt_row + c, n, a.vector_rows);
      if (kOutput && a.z)
        raw.z[i] = load_quad(static_cast<const T*>(a.z) + t * a.z_row + c, n, a.vector_rows);
    }
#pragma unroll
    for (int i = 0; i < kStateItems; ++i) {
      const int index = threadIdx.x + i * kThreads, quad = index % kStateQuads;
      const int which = quad / (kStates / 4), n = quad % (kStates / 4) * 4;
      const int64_t t = t0 + index / kStateQuads;
      const bool there = t < end && index < kTokens * kStateQuads;
      const T* p = which == 0 ? static_cast<const T*>(a.B) + t * a.B_row + group * a.B_group
                              : static_cast<const T*>(a.C) + t * a.C_row + group * a.C_group;
      raw.bc[i] = load_quad(p + n, there ? a.d_state - n : 0, a.vector_states);
    }
  }

  // Past the piece's end delta is 0, so that the state stays as it is.
  static __device__ void stage(Shared& shared, const Raw& raw, const Floats<4>& bias, int tokens) {
    const int row = threadIdx.x / kQuads, quad = threadIdx.x % kQuads;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int t = row + i * kRowsAtOnce;
      const Floats<4> u = unpack(raw.u[i]), dt = unpack(raw.dt[i]);
      float4 pair[2];
      float* out = reinterpret_cast<float*>(pair);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        out[2 * k] = t < tokens ? softplus(dt[k] + bias[k]) : 0.f;
        out[2 * k + 1] = out[2 * k] * u[k];
      }
      if (t < kTokens) {
        float4* to = reinterpret_cast<float4*>(&shared.delta[t][quad * 4]);
        to[0] = pair[0], to[1] = pair[1];
      }
    }
#pragma unroll
    for (int i = 0; i < kStateItems; ++i) {
      const int index = threadIdx.x + i * kThreads, quad_n = index % kStateQuads;
      if (index >= kTokens * kStateQuads) break;
      const int which = quad_n / (kStates / 4), n = quad_n % (kStates / 4) * 4;
      float* to = &shared.bc[index / kStateQuads][0];
      const Floats<4> x = unpack(raw.bc[i]);
      if constexpr (S >= 4) {
        *reinterpret_cast<float4*>(to + place(which, n)) = make_float4(x[0], x[1], x[2], x[3]);
      } else {
        *reinterpret_cast<float2*>(to + place(which, n)) = make_float2(x[0], x[1]);
        *reinterpret_cast<float2*>(to + place(which, n + 2)) = make_float2(x[2], x[3]);
      }
    }
  }

  static __device__ void read_states(float (&b)[S], float (&c)[S], const float* row, int lane) {
    if constexpr (S == 2 && kOutput) {
      const float4 x = *reinterpret_cast<const float4*>(row + place(0, lane * S));
      b[0] = x.x, b[1] = x.y, c[0] = x.z, c[1] = x.w;
    } else if constexpr (S == 2) {
      const float2 x = *reinterpret_cast<const float2*>(row + place(0, lane * S));
      b[0] = x.x, b[1] = x.y;
    } else {
#pragma unroll
      for (int q = 0; q < S; q += 4) {
        const float4 x = *reinterpret_cast<const float4*>(row + place(0, lane * S + q));
        b[q] = x.x, b[q + 1] = x.y, b[q + 2] = x.z, b[q + 3] = x.w;
        if constexpr (kOutput) {
          const float4 v = *reinterpret_cast<const float4*>(row + place(1, lane * S + q));
          c[q] = v.x, c[q + 1] = v.y, c[q + 2] = v.z, c[q + 3] = v.w;
        }
      }
    }
  }

  // h: the state; g (kFromZero): the state had it been zero at the segment's start; sum: of delta.
  template <bool kFromZero>
  static __device__ void scan(Shared& shared, const float (&A)[S], float (&h)[S], float (&g)[S],
                              float& sum, int tokens) {
    const int lane = threadIdx.x % L, channel = threadIdx.x / L;
#pragma unroll 2
    for (int t = 0; t < tokens; t += 4) {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 d = shared.delta[t + i][channel];
        float b[S], c[S];
        read_states(b, c, shared.bc[t + i], lane);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const float decay = exp2_approx(d.x * A[s]), input = d.y * b[s];
          h[s] = fmaf(decay, h[s], input);
          if constexpr (kFromZero) g[s] = fmaf(decay, g[s], input);
        }
        if constexpr (kFromZero || !kOutput) sum += d.x;
        if constexpr (kOutput) y[i] = sum_of_pairs(h, c);
      }
      if constexpr (kOutput) {
        const float total = sum_lanes<L>(y, lane);
        if (lane < 4) shared.y[t + lane][channel] = total;
      }
    }
  }

  static __device__ void finish(const Shared& shared, const Raw& raw, const Args& a, int64_t t0,
                                int tokens, int c, int c_end, const Floats<4>& D) {
    const int row = threadIdx.x / kQuads, quad = threadIdx.x % kQuads;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int t = row + i * kRowsAtOnce;
      if (t >= tokens) continue;
      const float4 sums = *reinterpret_cast<const float4*>(&shared.y[t][quad * 4]);
      const Floats<4> u = unpack(raw.u[i]), z = unpack(raw.z[i]);
      Floats<4> y = {{sums.x, sums.y, sums.z, sums.w}};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        y[k] = fmaf(D[k], u[k], y[k]);
        if (a.z) y[k] *= silu(z[k]);
      }
      store_quad(static_cast<T*>(a.y) + (t0 + t) * a.y_row + c, y, c_end - c, a.vector_rows);
    }
  }
};

__device__ Floats<4> load_parameters(const float* p, int c, int c_end) {
  Floats<4> out{};
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (p && c + k < c_end) out[k] = p[c + k];
  return out;
}

template <class T, int L, int S, int kChannels, bool kOutput>
__global__ void __launch_bounds__(L* kChannels)
    selective_scan_fwd_tiled(const __grid_constant__ Args a, const Mode mode) {
  using Block = Tile<T, L, S, kChannels, kOutput>;
  __shared__ __align__(16) typename Block::Shared shared;
  const Piece piece = find_piece(a, mode, blockIdx.x / a.channel_blocks);
  if (piece.begin >= piece.end) return;
  const int block = blockIdx.x % a.channel_blocks, group = block / a.group_blocks;
  const int c0 = group * a.group_width + block % a.group_blocks * kChannels;
  const int c_end = (group + 1) * a.group_width;

  // The quad of channels that this thread stages, and the states that it scans.
  const int quad_c = c0 + threadIdx.x % Block::kQuads * 4;
  const Floats<4> D = load_parameters(a.D, quad_c, c_end),
                  bias = load_parameters(a.dt_bias, quad_c, c_end);
  const int c = c0 + threadIdx.x / L, n = threadIdx.x % L * S;
  const int count = c < c_end ? a.d_state - n : 0;
  const int64_t row = static_cast<int64_t>(c) * a.d_state + n,
                plane = static_cast<int64_t>(a.d_inner) * a.d_state;
  float A[S], h[S], h_start[S], g[S], sum = 0;
  load_states(A, a.A + row, count, a.vector_saved);
#pragma unroll
  for (int s = 0; s < S; ++s) A[s] *= kLog2E, h_start[s] = g[s] = 0;
  const int64_t state_slot = a.slot ? a.slot[piece.sequence] : piece.sequence;
  if (mode == Mode::segments)
    load_states(h, a.start_states + piece.segment_slot * plane + row, count, a.vector_saved);
  else
    load_states(h, a.state + state_slot * plane + row,
                a.state && piece.begin == piece.seq_begin ? count : 0, a.vector_saved);

  typename Block::Raw now, next;
  Block::fetch(next, a, piece.begin, piece.end, quad_c, c_end, group);
  bool middle = false;  // in a segment neither first nor last
  for (int64_t t0 = piece.begin; t0 < piece.end; t0 += Block::kTokens) {
    const int64_t behind = t0 - piece.seq_begin;
    const int tokens = static_cast<int>(min(int64_t{Block::kTokens}, piece.end - t0));
    now = next;
    Block::stage(shared, now, bias, tokens);
    __syncthreads();  // the tile is staged
    Block::fetch(next, a, t0 + Block::kTokens, piece.end, quad_c, c_end, group);
    if (behind % kScanSegment == 0 && mode == Mode::sequences && behind > 0) {
      middle = t0 + kScanSegment < piece.seq_end;
      sum = 0;
#pragma unroll
      for (int s = 0; s < S; ++s) h_start[s] = h[s], g[s] = 0;
    }
    if (a.saved && behind % kScanChunk == 0 && behind > 0 && mode != Mode::ends)
      store_states(a.saved + (t0 / kScanChunk - 1) * plane + row, h, count, a.vector_saved);
    if (middle)
      Block::template scan<true>(shared, A, h, g, sum, tokens);
    else
      Block::template scan<false>(shared, A, h, g, sum, tokens);
    if (middle && (behind + Block::kTokens) % kScanSegment == 0) {
#pragma unroll
      for (int s = 0; s < S; ++s) h[s] = fmaf(exp2_approx(A[s] * sum), h_start[s], g[s]);
    }
    __syncthreads();  // y is there, and the tile may be replaced
    if constexpr (kOutput) Block::finish(shared, now, a, t0, tokens, quad_c, c_end, D);
  }

  if (mode == Mode::ends) {
    store_states(a.start_states + piece.segment_slot * plane + row, h, count, a.vector_saved);
    if (n == 0 && c < c_end) a.delta_sums[piece.segment_slot * a.d_inner + c] = sum;
  } else if (kOutput && a.state && piece.end == piece.seq_end) {
    store_states(a.state + state_slot * plane + row, h, count, a.vector_saved);
  }
}

// From what segments end with to what they start with, in place. One thread for each (sequence,
// channel, state); loads of kAhead segments are under way at once.
__global__ void __launch_bounds__(kChainThreads)
    selective_scan_fwd_chain(const __grid_constant__ Args a, int64_t blocks_per_sequence) {
  constexpr int kAhead = 16;
  const int sequence = static_cast<int>(blockIdx.x / blocks_per_sequence);
  const int64_t plane = static_cast<int64_t>(a.d_inner) * a.d_state;
  const int64_t i = blockIdx.x % blocks_per_sequence * blockDim.x + threadIdx.x;
  if (i >= plane) return;
  const int64_t begin = a.seq_start[sequence], end = a.seq_start[sequence + 1];
  const int64_t segments = (end - begin + kScanSegment - 1) / kScanSegment;
  if (segments == 0) return;
  const int64_t slot = scan_segment_slots(begin, sequence), c = i / a.d_state;
  float* states = a.start_states + slot * plane + i;
  const float* sums = a.delta_sums + slot * a.d_inner + c;
  const float A = a.A[i] * kLog2E;
  float h = 0;
  if (a.state) h = a.state[(a.slot ? a.slot[sequence] : sequence) * plane + i];
  for (int64_t j0 = 0; j0 < segments; j0 += kAhead) {
    float end_state[kAhead], sum[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (j0 + k + 1 < segments) {
        end_state[k] = states[(j0 + k) * plane];
        sum[k] = sums[(j0 + k) * a.d_inner];
      }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (j0 + k >= segments) return;
      states[(j0 + k) * plane] = h;
      h = j0 + k == 0 ? end_state[k] : fmaf(exp2_approx(A * sum[k]), h, end_state[k]);
    }
  }
}

Args arguments(const SelectiveScan& op) {
  Args a{};
  const auto row = [](const Tensor& t) { return t ? t.stride[0] : 0; };
  a.u = op.u.data, a.dt = op.dt.data, a.z = op.z.data, a.B = op.B.data, a.C = op.C.data;
  a.y = op.y.data;
  a.u_row = row(op.u), a.dt_row = row(op.dt), a.z_row = row(op.z), a.y_row = row(op.y);
  a.B_row = row(op.B), a.C_row = row(op.C);
  a.B_group = op.B.stride[1], a.C_group = op.C.stride[1];
  const auto f32 = [](const Tensor& t) { return t ? t.ptr<float>() : nullptr; };
  a.A = f32(op.A), a.D = f32(op.D), a.dt_bias = f32(op.dt_bias);
  a.state = f32(op.state), a.saved = f32(op.saved);
  a.seq_start = op.seq_start ? op.seq_start.ptr<int32_t>() : nullptr;
  a.slot = op.state && op.slot ? op.slot.ptr<int32_t>() : nullptr;
  a.d_inner = static_cast<int>(op.u.shape[1]);
  a.d_state = static_cast<int>(op.A.shape[1]);
  a.group_width = static_cast<int>(op.u.shape[1] / op.B.shape[1]);
  a.vector_rows = vector_rows(op.u, 4) && vector_rows(op.dt, 4) && vector_rows(op.z, 4) &&
                  vector_rows(op.y, 4) && a.group_width % 4 == 0;
  a.vector_states = vector_rows(op.B, 4) && vector_rows(op.C, 4);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  a.vector_saved = op.A.shape[1] % 4 == 0 && aligned(a.A) && aligned(a.state) && aligned(a.saved);
  return a;
}

template <class T, bool kOutput>
void launch(const Args& a, const ScanForwardPlan& plan, Mode mode, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks));
  const unsigned threads = static_cast<unsigned>(plan.threads());
  const auto is = [&](int lanes, int lane_states, int channels) {
    return plan.lanes == lanes && plan.lane_states == lane_states && plan.channels == channels;
  };
  if (is(4, 4, 32)) {
    selective_scan_fwd_tiled<T, 4, 4, 32, kOutput><<<grid, threads, 0, stream>>>(a, mode);
  } else if (is(8, 2, 16)) {
    selective_scan_fwd_tiled<T, 8, 2, 16, kOutput><<<grid, threads, 0, stream>>>(a, mode);
  } else if (is(16, 4, 16)) {
    selective_scan_fwd_tiled<T, 16, 4, 16, kOutput><<<grid, threads, 0, stream>>>(a, mode);
  } else {
    KRAIT_CHECK(is(32, 8, 8), plan.to_string());
    selective_scan_fwd_tiled<T, 32, 8, 8, kOutput><<<grid, threads, 0, stream>>>(a, mode);
  }
  check_launch("selective_scan_fwd_tiled");
}

}  // namespace

// Without y: fills op.saved and leaves op.state as it is.
void selective_scan_fwd(Context& ctx, const SelectiveScan& op) {
  State& gpu = state_of(ctx);
  const ScanShape shape = {.tokens = op.u.shape[0],
                           .num_seqs = op.seq_start.shape[0] - 1,
                           .d_inner = op.u.shape[1],
                           .d_state = op.A.shape[1],
                           .n_groups = op.B.shape[1]};
  const ScanForwardPlan plan = plan_selective_scan_fwd(shape, gpu.multiprocessors);
  Args a = arguments(op);
  a.num_seqs = static_cast<int>(shape.num_seqs);
  a.group_blocks = static_cast<int>(plan.group_blocks);
  a.channel_blocks = static_cast<int>(plan.channel_blocks);
  dispatch_f32_bf16(op.u.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Mode mode = Mode::sequences;
    const Arena::Scope scope(ctx.workspace());
    if (plan.segmented) {
      mode = Mode::segments;
      a.start_states = ctx.workspace().array<float>(plan.start_states);
      a.delta_sums = ctx.workspace().array<float>(plan.delta_sums);
      launch<T, false>(a, plan, Mode::ends, gpu.stream);
      selective_scan_fwd_chain<<<static_cast<unsigned>(plan.chain_blocks), kChainThreads, 0,
                                 gpu.stream>>>(a, plan.chain_blocks / shape.num_seqs);
      check_launch("selective_scan_fwd_chain");
    }
    if (op.y)
      launch<T, true>(a, plan, mode, gpu.stream);
    else
      launch<T, false>(a, plan, mode, gpu.stream);
  });
}

}  // namespace krait::cuda
