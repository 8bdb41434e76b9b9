// How the CUDA engine cuts a decoder step (decoder_step.h) of many sequences through a small model
// into clusters: pure functions of shapes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/decoder_step_plan.h"

namespace krait::cuda {

// Blocks of a cluster, each with a multiprocessor of its own: more than every GPU of its compute
// capability must offer, as many as it can.
inline constexpr int kClusterBlocks = 16;
inline constexpr int kClusterGroups = 3;  // warpgroups that compute
inline constexpr int kClusterThreads = 128 * kClusterGroups;
// One more warp copies what comes from memory.
inline constexpr int kClusterCopyWarp = 4 * kClusterGroups;
inline constexpr int kClusterTile = 64;     // rows, or inputs, of a product of the tensor cores
inline constexpr int kClusterTiles = 2;     // of rows that a warpgroup multiplies at a time
inline constexpr int kClusterOutSteps = 4;  // of inputs of out_proj at a time
inline constexpr int kClusterOctet = 8;     // sequences that are sent at a time
inline constexpr int kClusterMaxSeqs = 24;
// Sequences that find no room at once go in passes, one behind the other: so many at most, then the
// ops are faster, which gain more by states in bf16 (docs/kernels_cuda.md).
inline constexpr int kClusterMaxPasses = 4, kClusterMaxPassesOfBf16 = 2;
inline constexpr int kClusterMaxOctets = kClusterMaxSeqs / kClusterOctet;
// Behind the copying warp: each sends what other blocks await of its octet.
inline constexpr int kClusterSendWarps = kClusterMaxOctets;
inline constexpr int kClusterAllThreads = kClusterThreads + 32 * (1 + kClusterSendWarps);
inline constexpr int kClusterMaxLayers = 48;  // their addresses are a launch's arguments
inline constexpr int kClusterMaxStages = 8;
inline constexpr int kClusterAlignment = 1024;  // of tiles in shared memory
inline constexpr int kClusterGap = 4;  // behind a sequence's sums on chip: no bank conflicts
inline constexpr int kClusterStates = 16, kClusterBefore = 3;  // d_state, d_conv - 1

// Byte offsets into a block's shared memory, from a multiple of kClusterAlignment on.
struct DecoderClusterShared {
  int ring = 0;
  // x, bf16(r norm) of all of d_model; behind in_proj, what the scan takes: of a sequence and
  // channel delta with delta u, and u with z; B with C of a sequence.
  int x = 0, steps = 0, uz = 0, BC = 0;
  // y of all of d_inner. Before, the convolution's states and, behind it, dt_proj's sums; in_proj's
  // sums for x, then for z; u, x_dbl and the parts of its sums, which lie as they are sent
  // (decoder_cluster.cuh). Behind, out_proj's sums.
  int y = 0, conv = 0, dt_sums = 0, sums = 0, u = 0, x_dbl = 0, parts = 0, out_sums = 0;
  int received = 0;  // parts of x_dbl's sums, by all blocks
  int A = 0, D = 0;
  // What a block sends of x and y lies apart from where it is multiplied, whose place is taken
  // before all others have it: x in y's place, which is taken behind x_dbl, y in received's, which
  // is idle until the next layer's.
  int x_sent = 0, y_sent = 0;
  int squares = 0, row_squares = 0, scale = 0;
  int residual = 0, slots = 0, barriers = 0;
  int bytes = 0;
};

// Each cluster carries its own sequences of a pass's through all layers: [i num_seqs / clusters, (i
// + 1) num_seqs / clusters). Block b of a cluster owns channels [b channels, (b + 1) channels) and
// outputs (of out_proj) likewise.
struct DecoderClusterPlan {
  bool usable = false;
  // More than one only where clusters have room for kClusterMaxSeqs sequences each.
  int passes = 0;
  int clusters = 0;
  int seqs = 0;                   // of a product: 8, 16 or 24
  int channels = 0, outputs = 0;  // of a block
  int u_width = 0;                // channels, up to a whole kClusterTile
  int x_proj_rows = 0, dt_rank = 0, d_model = 0, d_inner = 0;
  int stages = 0, stage_bytes = 0;  // of the ring
  int state_seqs = 0;               // whose states a stage holds: a power of two, at most an octet
  DecoderClusterShared shared;

  // x_dbl's sums are brought together by runs of eight rows of a sequence; a block's share of them.
  constexpr int x_dbl_runs() const { return x_proj_rows / 8 * seqs; }
  constexpr int own_runs() const { return (x_dbl_runs() + kClusterBlocks - 1) / kClusterBlocks; }
  // Of kClusterTile inputs, the last one's ending early.
  constexpr int dt_steps() const { return (dt_rank + kClusterTile - 1) / kClusterTile; }
  constexpr int sums_pitch() const { return channels + kClusterGap; }
  constexpr int steps_pitch() const { return channels + kClusterGap / 2; }
  static constexpr int out_pitch() { return kClusterTile + kClusterGap; }
};

// state_bytes: of an element of the states. clusters: of kClusterBlocks blocks with shared_bytes
// each that run at once.
DecoderClusterPlan plan_decoder_cluster(const DecoderShape&, int state_bytes, int clusters,
                                        size_t shared_bytes);

}  // namespace krait::cuda
