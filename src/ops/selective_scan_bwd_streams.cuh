// What the streams' kernels share: their arguments, and who walks what.
#pragma once

#include <type_traits>

#include "ops/cuda/math.cuh"
#include "ops/cuda/sequences.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/selective_scan_bwd_streams.h"
#include "ops/selective_scan_plan.h"

namespace krait::cuda::scan_streams {

inline constexpr int kTile = static_cast<int>(kScanChunk);
inline constexpr int kWarpStates = kScanStreamsStates;
inline constexpr int kPiece = static_cast<int>(kScanStreamsPiece);
static_assert(kTile == 64 && kWarpStates == 16 && kPiece % kTile == 0);

struct Args {
  const bf16 *u, *dt, *z, *dy, *B, *C;
  bf16 *du, *ddt, *dz, *y;  // y: null when not wanted
  uint32_t u_row, dt_row, z_row, dy_row, B_row, C_row, du_row, ddt_row, dz_row, y_row;  // bytes
  int64_t B_group, C_group;
  const float *A, *D, *dt_bias, *state, *saved;
  float* dstate;
  const int32_t *seq_start, *slot;
  float *dB, *dC;     // (blocks, tokens, sums_row): sums over the block's channels
  float* dA;          // (walkers, d_inner, d_state)
  float* dD_dbias;    // (walkers, 2, d_inner)
  float* behind;      // (slots, d_inner, d_state): what flows into a piece from the next one
  float* delta_sums;  // (slots, d_inner): of the next piece
  // (slots, d_inner, d_state): what flows into a long sequence; dstate is overwritten
  float* behind_last;
  float* behind_part;  // (part slots, d_inner, d_state): what flows into a part
  int64_t tokens, pieces;
  int64_t plane;  // d_inner * d_state
  int64_t whole;  // pieces up to this number are walked whole, the others in parts
  int num_seqs, d_inner, d_state, group_channels;
  int part;  // tokens of a part, a power of two; 0: whole = pieces
};

// A sequence or a part of one; tokens counted over the batch.
struct Piece {
  int begin, end, seq_begin, sequence;
  int64_t slot;            // of what flows into it, if it is not the last of its sequence
  int64_t state_row;       // of the pool of states
  bool first, last, many;  // of its sequence
  bool part;               // of a piece
};

// The sequences' last pieces come first, so that no multiprocessor gets many of the numbers beyond,
// most of which may stand for nothing.
__device__ __forceinline__ bool find_piece(const Args& a, int64_t index, Piece& p) {
  const int32_t* start = a.seq_start;
  int sequence = static_cast<int>(index);
  p.last = index < a.num_seqs;
  p.part = false;
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

__device__ __forceinline__ bool find_part(const Args& a, Piece& p, int part) {
  p.begin += part * a.part;
  if (p.begin >= p.end) return false;
  p.end = min(p.end, p.begin + a.part);
  p.first = p.first && part == 0;
  p.part = true;
  return true;
}

// Floats from one token's sums of dB (and dC) to the next one's. Where warps share channels, a
// token's dC lies behind its dB.
constexpr int sums_row(int d_state) { return d_state == kWarpStates ? d_state : 2 * d_state; }

__device__ __forceinline__ int64_t plane_of(const Args& a) { return a.plane; }

// What flows into the part that begins there. Parts have distinct slots, as the pieces of different
// sequences do.
__device__ __forceinline__ float* behind_part(const Args& a, const Piece& p, int begin) {
  return a.behind_part + (int64_t{begin / a.part} + p.sequence) * plane_of(a);
}

// What flows into the piece; null: nothing.
__device__ __forceinline__ const float* flows_in(const Args& a, const Piece& p) {
  if (!p.last) return a.behind + p.slot * plane_of(a);
  if (p.many) return a.behind_last + p.seq_begin / kPiece * plane_of(a);
  return a.dstate ? a.dstate + p.state_row * plane_of(a) : nullptr;
}

__device__ __forceinline__ int last_tile(const Piece& p) {
  return p.begin + (p.end - p.begin - 1) / kTile * kTile;
}

// A token's row. All unsigned, which one instruction does; a token below zero gives a place that
// nobody may read.
template <class T>
__device__ __forceinline__ T* row_of(T* p, int token, uint32_t row_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  uint64_t at;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(at) : "r"(token), "r"(row_bytes));
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + at);
}

// Two channels of a token; none: zeros.
__device__ __forceinline__ Packed<bf16, 2> load_pair(const bf16* p, bool there) {
  return there ? load_packed<2>(p) : Packed<bf16, 2>{};
}

// The first passes, by selective_scan_bwd_carry_cuda.cu.
void find_carries(const Args&, const ScanStreamsPlan&, cudaStream_t);

}  // namespace krait::cuda::scan_streams
