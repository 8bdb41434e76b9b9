// What a block does in the selective scan's forward pass.
#pragma once

#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/math.cuh"
#include "ops/cuda/sequences.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/selective_scan_plan.h"

namespace krait::cuda::scan_fwd {

struct Args {
  const void *u, *dt, *z, *B, *C;
  void* y;
  int64_t u_row, dt_row, z_row, B_row, C_row, y_row;  // in elements
  int u_step, dt_step, z_step, y_step;                // in bytes, from a warp's step to the next
  int64_t B_group, C_group;
  const float *A, *D, *dt_bias;  // D, dt_bias: null when none
  float *state, *saved;          // null when none
  float* start_states;           // (slots of segments, d_inner, d_state)
  float* delta_sums;             // (slots of segments, d_inner)
  const int32_t *seq_start, *slot;
  int num_seqs, d_inner, d_state;
  int group_width, group_blocks, channel_blocks;
  bool gated;          // z is there; else z is as u
  bool vector_states;  // B and C may be read four states at a time
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

__device__ inline Piece find_piece(const Args& a, Mode mode, int64_t index) {
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

template <class T, int V>
__device__ void insert(Packed<T, V>& vector, int i, uint32_t word) {
  if constexpr (sizeof(T) == 4)
    vector.word[i] = word;
  else
    vector.word[i / 2] |= word << (i % 2 * 16);  // into zeros
}

// Up to four neighbouring elements, `count` of them there.
template <bool kVector, class T>
__device__ Packed<T, 4> load_quad(const T* p, int count) {
  Packed<T, 4> out{};
  if constexpr (kVector) {
    if (count > 0) out = load_packed<4>(p);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) insert(out, i, load_packed<1>(p + i).word[0]);
  }
  return out;
}

// One instruction: 32 x 32 + 64 bits.
template <class T>
__device__ const T* behind(const T* p, int steps, int bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + int64_t{steps} * bytes);
}
template <class T>
__device__ T* behind(T* p, int steps, int bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(p) + int64_t{steps} * bytes);
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

// A final state's -0 becomes 0, as tokens past a sequence's end make it where a layout pads.
template <int S>
__device__ void unsign_zeros(float (&h)[S]) {
#pragma unroll
  for (int s = 0; s < S; ++s) h[s] += 0.f;
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

// Sums of y[0..R) over a channel's L lanes, as a tree over neighbours; lane i gets that of token
// i % R.
template <int L, int R, int kDistance>
__device__ float sum_lanes(float (&y)[R], int lane) {
#pragma unroll
  for (int d = 1; d < R; d *= 2) {
    const bool odd = lane & d;
#pragma unroll
    for (int i = 0; i < R / (2 * d); ++i) {
      const float keep = odd ? y[2 * i + 1] : y[2 * i], give = odd ? y[2 * i] : y[2 * i + 1];
      y[i] = keep + __shfl_xor_sync(~0u, give, d * kDistance);
    }
  }
#pragma unroll
  for (int d = R; d < L; d *= 2) y[0] += __shfl_xor_sync(~0u, y[0], d * kDistance);
  return y[0];
}

// The layout of a block. A warp scans 32 / L channels by itself, kStep tokens at a time. Each of a
// step's (token, channel) belongs to one lane, which reads its u, dt and z, computes delta and the
// gate, and writes y; through shared memory it hands delta to the channel's lanes and gets the sum
// over states from them. Only B and C are shared by the block's warps.
template <class T, int L, int S, int kChannels, bool kOutput>
struct Tile {
  static constexpr int kThreads = L * kChannels, kStates = L * S, kWarps = kThreads / 32;
  static constexpr int kStep = kStates > 128 ? 4 : 8;  // tokens
  static constexpr int kWarpChannels = 32 / L;
  static constexpr int kOwn = L < kStep ? kStep / L : 1;  // channels of a lane, of one token
  static constexpr int kOwners = kWarpChannels / kOwn;    // lanes that share a token
  static constexpr int kSummed = L < kStep ? L : kStep;   // tokens summed over lanes at once
  static constexpr int kPairRow = 2 * kStep + 4;          // floats; 4: rows start in other banks
  static constexpr int kYRow = kWarpChannels + kWarpChannels / 2;  // 3/2: tokens of a channel too
  static constexpr int kTokens = kStates <= 16 ? 64 : 4096 / (kStates < 128 ? 128 : 2 * kStates);
  static constexpr int kVectors = kOutput ? 2 : 1;  // B, and C when there is output
  static constexpr int kRowQuads = kVectors * kStates / 4;
  static constexpr int kQuads = kTokens * kRowQuads / kThreads;  // of a thread
  static_assert(kTokens * kRowQuads % kThreads == 0);

  // Which of its channel's lanes, and which of its warp's channels, a thread has. Neighbouring
  // threads have the same states of different channels: their 16-byte reads of B and C are the same
  // and cost half the shared memory cycles of the other order.
  static __device__ int lane_of() { return threadIdx.x % 32 / kWarpChannels; }
  static __device__ int channel_of() { return threadIdx.x % kWarpChannels; }

  static constexpr int kStages = 4;  // steps of inputs that are copied ahead
  static constexpr int kOwnBytes = kOwn * static_cast<int>(sizeof(T));
  static constexpr int kCopyBytes = kOwnBytes < 4 ? 4 : kOwnBytes;
  static constexpr int kStageBytes = 32 * kCopyBytes;
  // What a warp has in shared memory for itself. pair and y: two steps of each, one read while the
  // other is written.
  struct Exchange {
    uint4 inputs[kOutput ? 3 : 2][kStages * kStageBytes / 16];  // u, dt, z as lanes own them
    float pair[2][kWarpChannels][kPairRow];                     // delta, delta u
    float y[2][kOutput ? kStep : 1][kYRow < 4 ? 4 : kYRow];     // sums over states
  };
  struct Shared {
    float bc[2][kTokens][kVectors * kStates];  // two tiles; see place()
    Exchange warp[kWarps];
    float start[S][kThreads];  // the states at the start of a middle segment
  };

  // Where states n.. of B (which = 0) or C (1) lie in a row of Shared::bc, so that a warp's 16-byte
  // reads touch each bank once. S = 2: B and C of a lane side by side.
  static __device__ int place(int which, int n) {
    if constexpr (S >= 4)
      return ((which * (S / 4) + n % S / 4) * L + n / S) * 4;
    else
      return n * kVectors + which * 2;
  }

  // Four states of B or C to a thread, of every kQuadRows-th token of a tile.
  static constexpr int kQuadRows = kThreads / kRowQuads;
  static_assert(kThreads % kRowQuads == 0);
  static __device__ int quad_which() { return threadIdx.x % kRowQuads / (kStates / 4); }
  static __device__ int quad_state() { return threadIdx.x % (kStates / 4) * 4; }
  struct Quads {
    const T* from;  // of the thread's first token of the tile that is fetched next
    Packed<T, 4> q[kQuads];
  };
  static __device__ const T* quads_of(const Args& a, int64_t t0, int group) {
    const int64_t t = t0 + threadIdx.x / kRowQuads;
    const T* p = quad_which() == 0 ? static_cast<const T*>(a.B) + group * a.B_group + t * a.B_row
                                   : static_cast<const T*>(a.C) + group * a.C_group + t * a.C_row;
    return p + quad_state();
  }
  // left: tokens from the tile's first one to the piece's end.
  template <bool kVector>
  static __device__ void fetch_bc(Quads& raw, const Args& a, int left) {
    const int64_t step = kQuadRows * (quad_which() == 0 ? a.B_row : a.C_row);
    const int count = a.d_state - quad_state(), t = threadIdx.x / kRowQuads;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      raw.q[i] = load_quad<kVector>(raw.from, t + i * kQuadRows < left ? count : 0);
      raw.from += step;
    }
  }
  static __device__ void stage_bc(float (&bc)[kTokens][kVectors * kStates], const Quads& raw) {
    const int which = quad_which(), n = quad_state();
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      float* to = bc[threadIdx.x / kRowQuads + i * kQuadRows];
      const Floats<4> x = unpack(raw.q[i]);
      if constexpr (S >= 4) {
        *reinterpret_cast<float4*>(to + place(which, n)) = make_float4(x[0], x[1], x[2], x[3]);
      } else {
        *reinterpret_cast<float2*>(to + place(which, n)) = make_float2(x[0], x[1]);
        *reinterpret_cast<float2*>(to + place(which, n + 2)) = make_float2(x[2], x[3]);
      }
    }
  }

  static __device__ void read_bc(float (&b)[S], float (&c)[S], const float* row, int lane) {
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

  // Where a lane is.
  struct Lane {
    const T *u, *dt, *z;         // its own token of the first step, and its own channels
    T* y;                        // a step before that
    int step;                    // how many it has scanned
    uint32_t to;                 // its place in stage 0 of Exchange::inputs
    uint32_t u_at, dt_at, z_at;  // its elements' places there: an odd bf16 comes with its neighbour
    int left;    // from its own token of the step that is scanned to the piece's end
    int due;     // the same of the step before, whose y is to be written; 0: none
    bool there;  // its channels are
    float D[kOwn], bias[kOwn];
  };
  // A lane's own elements of a step.
  struct Own {
    Packed<T, kOwn> u, dt, z;
  };

  static __device__ const void* whole_words(const T* p) {
    if constexpr (kOwnBytes < 4)
      return reinterpret_cast<const char*>(p) - reinterpret_cast<uintptr_t>(p) % 4;
    else
      return p;
  }
  static __device__ uint32_t place_of(const T* p, uint32_t to, int tensor) {
    const uint32_t odd = kOwnBytes < 4 ? reinterpret_cast<uintptr_t>(p) % 4 : 0;
    return to + tensor * kStages * kStageBytes + odd;
  }
  // One group of copies, whether there is anything to copy or not. Past the piece's end u is 0 and
  // dt far below every softplus, so that delta and delta u are 0 and the state stays as it is.
  static constexpr uint32_t kPastDt = 0xf100f100;  // -6e29, in either type
  static __device__ void fetch_own(const Lane& at, const Args& a, int stage, int ahead, int left) {
    const int step = at.step + ahead;
    const uint32_t to = at.to + stage * kStageBytes;
    if (left > 0 && at.there) {
      copy_async<kCopyBytes>(to, whole_words(behind(at.u, step, a.u_step)));
      copy_async<kCopyBytes>(to + kStages * kStageBytes,
                             whole_words(behind(at.dt, step, a.dt_step)));
      if (kOutput)
        copy_async<kCopyBytes>(to + 2 * kStages * kStageBytes,
                               whole_words(behind(at.z, step, a.z_step)));
    }
    if (left <= 0) {
      fill_words<kCopyBytes>(to, 0);
      fill_words<kCopyBytes>(to + kStages * kStageBytes, kPastDt);
    }
    end_copies();
  }
  static __device__ Own take_own(const Lane& at, int stage) {
    Own own;
    own.u = load_copied<T, kOwn>(at.u_at + stage * kStageBytes);
    own.dt = load_copied<T, kOwn>(at.dt_at + stage * kStageBytes);
    if (kOutput) own.z = load_copied<T, kOwn>(at.z_at + stage * kStageBytes);
    return own;
  }
  // delta and delta u of own elements.
  struct Deltas {
    float2 pair[kOwn];
  };
  static __device__ Deltas deltas(const Own& own, const Lane& at) {
    const Floats<kOwn> u = unpack(own.u), dt = unpack(own.dt);
    Deltas out;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float delta = softplus(dt[i] + at.bias[i]);
      out.pair[i] = make_float2(delta, delta * u[i]);
    }
    return out;
  }
  static __device__ void hand_over(float (*pair)[kPairRow], const Deltas& deltas, int owner) {
    const int token = owner / kOwners, c = owner % kOwners * kOwn;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (32 / kOwners == kStep || token < kStep)
        *reinterpret_cast<float2*>(&pair[c + i][2 * token]) = deltas.pair[i];
  }

  // One step. h: the state; g (kFromZero): the state had it been zero at the segment's start; sum:
  // of delta; y: sums over states, of tokens lane % kSummed, + kSummed, ... A token's reads and
  // exps are written before the sums of the token before it, so that they overlap.
  template <bool kFromZero>
  static __device__ void scan(const float (*bc)[kVectors * kStates], const float* pair,
                              float (&y)[kStep / kSummed], const float (&A)[S], float (&h)[S],
                              float (&g)[S], float& sum, int lane) {
    float b[2][S], c[2][S], decay[2][S], sums[kSummed];
    float2 d[2];
    const auto read = [&](int t) {
      d[t % 2] = *reinterpret_cast<const float2*>(pair + 2 * t);
      read_bc(b[t % 2], c[t % 2], bc[t], lane);
#pragma unroll
      for (int s = 0; s < S; ++s) decay[t % 2][s] = exp2_approx(d[t % 2].x * A[s]);
    };
    read(0);
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      if (t + 1 < kStep) read(t + 1);
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const float input = d[t % 2].y * b[t % 2][s];
        h[s] = fmaf(decay[t % 2][s], h[s], input);
        if constexpr (kFromZero) g[s] = fmaf(decay[t % 2][s], g[s], input);
      }
      if constexpr (kFromZero || !kOutput) sum += d[t % 2].x;
      if constexpr (kOutput) {
        sums[t % kSummed] = sum_of_pairs(h, c[t % 2]);
        if (t % kSummed == kSummed - 1)
          y[t / kSummed] = sum_lanes<L, kSummed, kWarpChannels>(sums, lane);
      }
    }
  }

  static __device__ Floats<kOwn> take_sums(const float (*y)[kYRow < 4 ? 4 : kYRow], int owner) {
    const float* p = &y[owner / kOwners % kStep][owner % kOwners * kOwn];
    return load_vector<kOwn>(p);
  }
  static __device__ void finish(const Own& own, const Floats<kOwn>& sums, const Lane& at,
                                const Args& a) {
    const Floats<kOwn> u = unpack(own.u), z = unpack(own.z);
    Floats<kOwn> out;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      out[i] = fmaf(at.D[i], u[i], sums[i]);
      out[i] *= a.gated ? silu(z[i]) : 1.f;
    }
    if (at.due > 0 && at.there) store_vector<kOwn>(behind(at.y, at.step, a.y_step), out);
  }

  // Inputs that a lane holds: of the step before (until its y is written) and of this one. Those of
  // the next four are in shared memory or on their way there.
  struct Pipeline {
    Own before, now;
    int stage;  // 0 or 2: of the step that is scanned, when that is a tile's first, third, ..
  };

  // kHalf: of Exchange, for this step's delta and y.
  template <bool kFromZero, int kHalf>
  static __device__ void step(const float (*bc)[kVectors * kStates], Exchange& warp, Pipeline& p,
                              const float (&A)[S], float (&h)[S], float (&g)[S], float& sum,
                              Lane& at, const Args& a) {
    const int lane = lane_of(), channel = channel_of(), owner = threadIdx.x % 32;
    wait_for_copies<kStages - 2>();
    const Own next = take_own(at, kHalf == 0 ? p.stage + 1 : p.stage ^ 2);
    fetch_own(at, a, p.stage + kHalf, kStages, at.left - kStages * kStep);
    Floats<kOwn> sums;
    if constexpr (kOutput) sums = take_sums(warp.y[kHalf ^ 1], owner);
    const Deltas pair = deltas(next, at);
    float y[kStep / kSummed];
    scan<kFromZero>(bc, warp.pair[kHalf][channel], y, A, h, g, sum, lane);
    if constexpr (kOutput) finish(p.before, sums, at, a);
    // Shared memory is written last: reads cannot be moved over a write.
    hand_over(warp.pair[kHalf ^ 1], pair, owner);
#pragma unroll
    for (int i = 0; i < kStep / kSummed; ++i)
      if (kOutput && (L <= kStep || lane < kStep))
        warp.y[kHalf][i * kSummed + lane % kSummed][channel] = y[i];
    at.due = at.left, at.left -= kStep, ++at.step;
    p.before = p.now, p.now = next;
    __syncwarp();  // the next step's delta and this one's y are there, those before may go
  }

  template <bool kFromZero>
  static __device__ void scan_tile(const float (*bc)[kVectors * kStates], Exchange& warp,
                                   Pipeline& p, int tokens, const float (&A)[S], float (&h)[S],
                                   float (&g)[S], float& sum, Lane& at, const Args& a) {
#pragma unroll 1
    for (int t = 0; t < tokens; t += 2 * kStep) {
      step<kFromZero, 0>(bc + t, warp, p, A, h, g, sum, at, a);
      step<kFromZero, 1>(bc + t + kStep, warp, p, A, h, g, sum, at, a);
      p.stage ^= 2;
    }
  }
};

}  // namespace krait::cuda::scan_fwd
