// How the CUDA backward pass of the selective scan is cut: pure functions of shapes, tested without
// a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "ops/selective_scan_plan.h"

namespace krait::cuda {

// A block walks tiles of kScanChunk tokens backwards in time. In a tile it goes through `rounds`
// units of kScanBwdUnit channels, one unit at a time; each of its warps owns kScanBwdWarpChannels
// of a unit. States come in blocks of kScanBwdStates.
inline constexpr int kScanBwdWarps = 4;
inline constexpr int kScanBwdThreads = 32 * kScanBwdWarps;
inline constexpr int kScanBwdWarpChannels = 4;
inline constexpr int kScanBwdUnit = kScanBwdWarps * kScanBwdWarpChannels;
inline constexpr int kScanBwdStates = 16;
inline constexpr int kScanBwdChainThreads = 128;
inline constexpr int kScanBwdBlocksPerMultiprocessor = 2;  // of at most 255 registers a thread
// dB and dC are summed over channels as a tree that no plan changes: within a unit, then over the
// kScanBwdPair units of a pair, then over pairs. So rounds is 1 or kScanBwdPair.
inline constexpr int kScanBwdPair = 2;
// At every multiple of this many tokens behind a sequence's start, the gradient that flows back is
// put together from exp(A sum of delta) times what flows into the segment behind, and what that
// segment gives from zero. So segments may run side by side or one after the other, with the same
// bits. Segment j of sequence s has slot start_s / kScanBwdSegment + s + j, all of them distinct.
inline constexpr int64_t kScanBwdSegment = 512;

struct ScanBwdShape {
  int64_t tokens, num_seqs, d_inner, d_state, n_groups;
  size_t element_bytes;  // of T
};

struct ScanBwdDevice {
  int multiprocessors;
  size_t shared_bytes_per_block;
};

struct ScanBwdPlan {
  int padded_states;     // d_state filled up to blocks of kScanBwdStates
  int rounds;            // units of a block
  int64_t group_units;   // units of a group of channels; the last one may be ragged
  int64_t group_blocks;  // blocks of a group of channels
  int64_t blocks;        // grid.x: over all groups
  bool cut;              // segments run side by side: a pass for what flows back comes first
  int64_t pieces;        // slots of segments if cut, else sequences
  int64_t walkers;       // grid.y: block y takes pieces y, y + walkers, ..
  int stages;            // tiles of inputs in shared memory: 2 when the next one is fetched early
  size_t shared_bytes;

  int64_t chain_blocks;  // of the kernel that chains segments; 0 if none are cut

  std::string to_string() const;
};

// Throws Error where no plan fits into the device's shared memory.
ScanBwdPlan plan_selective_scan_bwd(const ScanBwdShape&, const ScanBwdDevice&);

// Offsets into a block's shared memory, in bytes.
struct ScanBwdShared {
  int tile;        // (stages, 4, kScanChunk, pitch) T: dt, u, dy, z; become ddt, du, y, dz
  int first;       // (stages, kScanBwdUnit, padded_states) f32: states before the tile
  int A;           // (channels, padded_states) f32, times log2(e)
  int carry;       // (channels, padded_states) f32: gradient that flows into the tile from behind
  int zero;        // (channels, padded_states) f32: the same, had it been zero behind the segment
  int behind;      // (channels, padded_states) f32: what flowed into the segment
  int dA;          // (channels, scan_bwd_dA_width) f32
  int sums;        // (3, channels) f32: dD, ddt_bias, delta of the segment
  int constants;   // (2, channels) f32: dt_bias, D
  int fetched_bc;  // (stages, 2, kScanChunk * kScanBwdStates) T: B, C as fetched, if d_state <= 16
  int bc;          // (2, kScanChunk * kScanBwdStates) f32: B, C of the tile
  int bc_sums;     // the same shape, rounds > 1 only: dB, dC of the rounds so far
  int tokens;      // (warps, kScanBwdWarpChannels, 6, kScanChunk) f32: see Quantity
  int exchange;    // (warps, kScanChunk * kScanBwdStates) f32
  int bytes;
};

// Elements from one row of a tile to the next: four beyond a unit, for few bank conflicts.
inline constexpr int kScanBwdPitch = kScanBwdUnit + 4;

// Floats that a channel's dA takes: sums of the lanes, (32, 4), or of all of them.
constexpr int scan_bwd_dA_width(int padded_states) {
  return padded_states == kScanBwdStates ? 128 : padded_states;
}

constexpr ScanBwdShared scan_bwd_shared(int rounds, int padded_states, int stages,
                                        size_t element_bytes) {
  constexpr int kFloat = 4, kTile = static_cast<int>(kScanChunk);
  const int channels = rounds * kScanBwdUnit;
  const int tile_bytes = kTile * kScanBwdPitch * static_cast<int>(element_bytes);
  const int by_state = channels * padded_states * kFloat;
  const int bc_bytes = 2 * kTile * kScanBwdStates * kFloat;
  ScanBwdShared s{};
  s.tile = 0;
  s.first = s.tile + stages * 4 * tile_bytes;
  s.A = s.first + stages * kScanBwdUnit * padded_states * kFloat;
  s.carry = s.A + by_state;
  s.zero = s.carry + by_state;
  s.behind = s.zero + by_state;
  s.dA = s.behind + by_state;
  s.sums = s.dA + channels * scan_bwd_dA_width(padded_states) * kFloat;
  s.constants = s.sums + 3 * channels * kFloat;
  s.fetched_bc = s.constants + 2 * channels * kFloat;
  s.bc = s.fetched_bc + (padded_states == kScanBwdStates
                             ? stages * bc_bytes * static_cast<int>(element_bytes) / kFloat
                             : 0);
  s.bc_sums = s.bc + bc_bytes;
  s.tokens = s.bc_sums + (rounds > 1 ? bc_bytes : 0);
  s.exchange = s.tokens + kScanBwdWarps * kScanBwdWarpChannels * 6 * kTile * kFloat;
  s.bytes = s.exchange + kScanBwdWarps * kTile * kScanBwdStates * kFloat;
  return s;
}

}  // namespace krait::cuda
