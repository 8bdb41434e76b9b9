// How the CUDA engine cuts the selective scan into blocks of threads: pure functions of shapes.
#pragma once

#include <cstdint>
#include <string>

namespace krait::cuda {

// Tokens between the states that the forward pass saves for the backward pass: the state before
// token t, for every t that is a multiple of this behind its sequence's start (and not the start),
// lies at slot t / kScanChunk - 1 of (slot, d_inner, d_state).
inline constexpr int64_t kScanChunk = 64;

// Sequences longer than this are cut into segments of this many tokens. The state that a segment
// but the first and the last ends with is exp(A sum of delta) times the state that it starts with,
// plus the state that it ends with from zero; so are the bits, whether its segments are scanned
// side by side or one after the other.
inline constexpr int64_t kScanSegment = 2048;
// Segment j of sequence s has slot start_s / kScanSegment + s + j, all of them distinct.
inline constexpr int64_t scan_segment_slots(int64_t tokens, int64_t num_seqs) {
  return tokens / kScanSegment + num_seqs;
}

inline constexpr int kChainThreads = 128;  // of the kernel that goes from segment to segment

struct ScanShape {
  int64_t tokens, num_seqs, d_inner, d_state, n_groups;
  int row_vector = 4;   // channels of u, dt, z and y that may be read at once: 4, 2 or 1
  bool output = true;   // y is wanted
  bool ends = false;    // of segments, but not the last of a sequence
  int state_bytes = 4;  // of an element of the states, in steps
  int beside = 1;       // scans of this kind run at once
};

inline constexpr int kScanRelayWarps = 6;     // of a block; two of 168 registers fit
inline constexpr int kScanRelayChannels = 8;  // of a block

// A block scans some channels of one sequence (or of one segment) from its start to its end.
// `lanes` neighbouring threads share a channel, each has `lane_states` of its states.
struct ScanForwardPlan {
  int lanes, lane_states;
  int channels;    // of a block, all of one group
  bool segmented;  // segments side by side: their ends from zero, then their starts, then the scan
  bool relay;      // the warps of a block scan in turn (selective_scan_relay.cuh)
  int64_t group_blocks, channel_blocks;              // of a group's channels, of all channels
  int64_t relay_group_blocks, relay_channel_blocks;  // the same of the relay's blocks
  int64_t pieces;                                    // sequences or slots of segments, at most
  int64_t blocks;                                    // in grid.x, without relay
  int64_t chain_blocks;                              // of the kernel that finds segments' starts
  int64_t start_states;                              // floats of scratch memory: states of segments
  int64_t delta_sums;  // floats of scratch memory: sums of delta of segments

  int threads() const { return lanes * channels; }
  std::string to_string() const;
};

ScanForwardPlan plan_selective_scan_fwd(const ScanShape&, int multiprocessors);

// Tokens of a stage (selective_scan_stage()). Where sequences are so few that they would be cut
// into segments, which costs every exp twice, or leave multiprocessors with few warps, stages side
// by side do without: four or more of a sequence, of at most two segments, so that none is a middle
// one. Narrower models would wait for the host, which queues some ten kernels for a stage and layer
// (at kNarrowestStages stages gain 6 to 14 %).
inline constexpr int64_t kLongScanStage = 2 * kScanSegment, kNarrowestStages = 1536;
int64_t scan_stage_tokens(const ScanShape&, int multiprocessors);

inline constexpr int kStepThreads = 128;
inline constexpr int kStepSequences = 4;

// One token for each sequence: `lanes` neighbouring threads share a channel of `sequences`
// sequences (1 or kStepSequences), four states at a time.
struct ScanStepPlan {
  int lanes, sequences;
  int64_t channel_blocks, sequence_blocks;  // grid.x, grid.y
};

ScanStepPlan plan_selective_scan_step(const ScanShape&, int multiprocessors);

// The same with dt_proj inside: 16 bytes of a channel's kProjectedStates states to a lane, so many
// channels of `sequences` sequences to a block.
inline constexpr int kProjectedThreads = 128, kProjectedStates = 16, kProjectedMaxRank = 256;
inline constexpr int projected_channels(int state_bytes) {
  return kProjectedThreads * 16 / (kProjectedStates * state_bytes);
}
// Few, or many: eight (channel, sequence) pairs to a thread.
inline constexpr int kProjectedFewSequences = 8;
inline constexpr int projected_many_sequences(int state_bytes) {
  return 8 * kProjectedThreads / projected_channels(state_bytes);
}
struct ScanStepProjectedPlan {
  int sequences;  // one of the two
  int blocks;     // that find room on a multiprocessor: 4, with more on its way for each, or 8
  int64_t channel_blocks, sequence_blocks;  // grid.x, grid.y
};

// dt_rank, d_inner, d_state, state_bytes: whether there is such a kernel.
bool scan_step_projects_shape(const ScanShape&, int64_t dt_rank);
ScanStepProjectedPlan plan_selective_scan_step_projected(const ScanShape&, int multiprocessors);

}  // namespace krait::cuda
