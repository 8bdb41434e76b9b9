// How the CUDA engine cuts a decoder step (decoder_step.h) of many sequences into kernels: pure
// functions of shapes.
#pragma once

#include <array>
#include <cstdint>

namespace krait::cuda {

struct DecoderBatchShape {
  int64_t num_seqs, d_model, d_inner;
  int state_bytes = 4;     // of an element of the convolution's states
  bool any_width = false;  // also where the ops are faster
};

inline constexpr int kDecoderBatchMaxSeqs = 128;
inline constexpr int kDecoderBatchStep = 64;         // inputs that go through a block at a time
inline constexpr int kDecoderBatchGroup = 64;        // rows of a matrix that four warps multiply
inline constexpr int kDecoderBatchMaxGroups = 2;     // of a block
inline constexpr int kDecoderBatchMaxStages = 8;     // steps on their way to a block
inline constexpr int kDecoderBatchAlignment = 1024;  // of tiles in shared memory
inline constexpr int kDecoderBatchGap = 4;  // between a sequence's sums on chip: no bank conflicts
inline constexpr int kDecoderBatchMaxSplit = 8;
// So much of the weights, and of the vectors, is on its way to a block: the next kernel's blocks
// find room beside it.
inline constexpr int kDecoderBatchWeightsOnWay = 80 << 10, kDecoderBatchVectorsOnWay = 64 << 10;
inline constexpr int kDecoderBatchSharedBytes = 220 << 10;  // at most

// A matrix times all sequences' vectors. A cluster of `split` blocks owns `boxes` runs of box_rows
// rows of the matrix; each block takes a part of the inputs, a step at a time, and at the end a
// part of the sequences.
struct DecoderBatchProduct {
  int num_seqs = 0, rows = 0;  // rows: of the matrix, for each box of a cluster
  int seqs = 0;                // of the tensor cores' tile: 8, 16, 32, 64 or 128
  int boxes = 0, box_rows = 0;
  int groups = 0;  // of kDecoderBatchGroup rows in a block, of which some may be empty
  int split = 0;
  int weight_stages = 0, vector_stages = 0;
  int steps = 0;        // of all parts
  int64_t tiles = 0;    // clusters
  int state_bytes = 0;  // that a block keeps of each of its sequences, for each row of a box

  int threads() const { return 128 * groups + 64; }
  int64_t blocks() const { return tiles * split; }
  int weight_bytes() const { return boxes * box_rows * kDecoderBatchStep * 2; }  // of a stage
  int vector_bytes() const { return seqs * kDecoderBatchStep * 2; }
  // Of a block's sums of a sequence.
  int pitch() const { return kDecoderBatchGroup * groups + kDecoderBatchGap; }
  int own_seqs() const { return (num_seqs + split - 1) / split; }  // at most
  // What other blocks send a block.
  int sent_bytes() const { return (split - 1) * own_seqs() * pitch() * 4; }
  int shared_bytes() const;
};

struct DecoderBatchPlan {
  bool usable = false;
  // in_proj: a box of x's rows, and the same channels' of z; out_proj: one box.
  DecoderBatchProduct in, out;
};

// clusters[n]: so many clusters of n blocks, each with a multiprocessor of its own, run at once.
struct DecoderBatchMachine {
  std::array<int, kDecoderBatchMaxSplit + 1> clusters{};
};

DecoderBatchPlan plan_decoder_batch(const DecoderBatchShape&, const DecoderBatchMachine&);

}  // namespace krait::cuda
