// What the kernels of the scan's backward pass share: arguments, the work list, and moving data
// between lanes and into shared memory.
#pragma once

#include "ops/cuda/math.cuh"
#include "ops/cuda/sequences.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/selective_scan_bwd_plan.h"

namespace krait::cuda::scan_bwd {

constexpr int kTile = static_cast<int>(kScanChunk);
constexpr int kRuns = 8, kRunTokens = 8;  // of a tile
constexpr int kLaneStates = 4;            // of a block of kScanBwdStates
constexpr int kUnit = kScanBwdUnit, kWarpChannels = kScanBwdWarpChannels;
constexpr int kBlockStates = kScanBwdStates;
constexpr int kTileStates = kTile * kBlockStates;
constexpr int kSegment = static_cast<int>(kScanBwdSegment);
static_assert(kRuns * kRunTokens == kTile);

template <class T>
struct Args {
  const T *u, *dt, *z, *dy, *B, *C;  // z: null when none
  T *du, *ddt, *dz, *y;              // y: null when not wanted
  int64_t u_row, dt_row, z_row, dy_row, B_row, C_row, du_row, ddt_row, dz_row, y_row;
  int64_t B_group, C_group;
  const float *A, *D, *dt_bias, *state, *saved;
  float* dstate;
  const int32_t *seq_start, *slot;
  float *dB, *dC;     // (blocks, tokens, d_state): sums over the block's channels
  float* dA;          // (walkers, d_inner, d_state)
  float* dD_dbias;    // (walkers, 2, d_inner)
  float* behind;      // (slots of segments, d_inner, d_state): what flows into a segment
  float* delta_sums;  // (slots of segments, d_inner)
  int64_t tokens, pieces;
  int num_seqs, d_inner, d_state, padded_states;
  int group_channels, group_blocks, rounds, stages;
  bool cut;
  bool vector_rows;    // four channels at a time: u, dt, z, dy, du, ddt, dz, y
  bool vector_bc;      // four states at a time
  bool vector_states;  // state, saved
};

// A sequence, or a segment of one; tokens counted over the batch.
struct Piece {
  int begin, end, seq_begin;
  int64_t segment_slot;  // of the segment that ends at `end`
  int64_t state_row;     // of the pool of states
  bool first;            // segment of its sequence
  bool many;             // segments in its sequence
};

__device__ int64_t segment_slot(int seq_begin, int sequence) {
  return seq_begin / kSegment + sequence;
}

template <class T>
__device__ bool find_piece(const Args<T>& a, int64_t index, Piece& p) {
  const int32_t* start = a.seq_start;
  int sequence = static_cast<int>(index);
  if (a.cut)
    sequence = last_not_above(a.num_seqs, index, [=](int i) { return segment_slot(start[i], i); });
  p.seq_begin = p.begin = start[sequence], p.end = start[sequence + 1];
  p.many = p.end - p.begin > kSegment;
  if (a.cut) {
    const int64_t segment = index - segment_slot(p.seq_begin, sequence);
    if (segment * kSegment >= p.end - p.begin) return false;
    p.begin += static_cast<int>(segment) * kSegment;
    p.end = min(p.end, p.begin + kSegment);
  }
  p.first = p.begin == p.seq_begin;
  p.segment_slot = index;
  p.state_row = a.slot ? a.slot[sequence] : sequence;
  return p.begin < p.end;
}

enum Quantity { kDelta, kDeltaU, kDy, kY, kQ, kW, kQuantities };
enum Input { kDt, kU, kGradY, kZ };  // become ddt, du, y, dz

// Place of a token in the arrays of (64 tokens): a run's first four tokens beside the other runs'
// first four, so that lanes of neighbouring runs read neighbouring 16 bytes.
__device__ __forceinline__ int place_of(int run, int token) {
  return (token / 4) * (kTile / 2) + run * 4 + token % 4;
}

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

// Copies kBytes (8 or 16) in the background; zeros where `from` is not to be read.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* from, bool read = true) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = read ? kBytes : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <class T>
__device__ __forceinline__ void store_packed(T* to, const Packed<T, 4>& x) {
  if constexpr (sizeof(T) == 4)
    *reinterpret_cast<uint4*>(to) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
  else
    *reinterpret_cast<uint2*>(to) = make_uint2(x.word[0], x.word[1]);
}
__device__ __forceinline__ float4 load4(const float* p) {
  return *reinterpret_cast<const float4*>(p);
}
__device__ __forceinline__ void store4(float* p, float a, float b, float c, float d) {
  *reinterpret_cast<float4*>(p) = make_float4(a, b, c, d);
}

}  // namespace krait::cuda::scan_bwd
