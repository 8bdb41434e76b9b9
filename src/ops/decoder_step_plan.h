// How the CUDA engine cuts a decoder step (decoder_step.h): pure functions of shapes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace krait::cuda {

struct DecoderShape {
  int64_t num_seqs, n_layer, d_model, d_inner, d_state, d_conv, dt_rank, vocab_size;
  bool int8 = false;  // in_proj, out_proj and head
  int64_t x_proj_rows() const { return dt_rank + 2 * d_state; }
};

// That multiply; one more warp copies the weights.
inline constexpr int kDecoderWarps = 8, kDecoderThreads = 32 * kDecoderWarps;
inline constexpr int kDecoderTile = 16;  // rows of a matrix that are multiplied at a time
// Of each row of a tile, copied at a time, and from one row to the next in shared memory.
inline constexpr int kDecoderPieceBytes = 1024, kDecoderPiecePitch = kDecoderPieceBytes + 64;
inline constexpr int kDecoderStageBytes = kDecoderTile * kDecoderPiecePitch;
inline constexpr int kDecoderPiecesUnderWay = 6;  // at most
inline constexpr int kDecoderGroups = 2;          // of warps: each multiplies pieces of its own
// Of a launch. Eight would fit a tensor core product, but what the blocks then exchange takes
// longer than reading the weights: the ops one by one are faster.
inline constexpr int kDecoderMaxSeqs = 4;
inline constexpr int kDecoderMaxLayers = 64;    // of a launch: their addresses are its arguments
inline constexpr int kDecoderLayerBytes = 128;  // of these
inline constexpr int kDecoderProducts = 5;      // kinds of matrices, and what describes one
inline constexpr int kDecoderProductBytes = 28;
// x_proj has few rows, which few blocks own, and all wait for: its tiles are four quarters of each
// of four rows.
inline constexpr int kDecoderParts = 4, kDecoderPartRows = kDecoderTile / kDecoderParts;
// Times 16 bytes of a row of dt_proj that a lane of the scan multiplies, at most.
inline constexpr int kDecoderDtPieces = 8;

// Pieces of the weights that the ring holds, in the kernel for `seqs` (1 or kDecoderMaxSeqs)
// sequences. Each place serves one group of warps: one that comes to a piece has read the piece
// before it in the same place, and knows by the parity of the barrier's phase which is there.
constexpr int decoder_stages(int seqs) { return seqs == 1 ? 10 : 6; }
static_assert(kDecoderPiecesUnderWay <= decoder_stages(kDecoderMaxSeqs));
static_assert(decoder_stages(1) % kDecoderGroups == 0 &&
              decoder_stages(kDecoderMaxSeqs) % kDecoderGroups == 0);
// Rows whose sums the warps bring together at a time: a thread for each row and sequence.
constexpr int decoder_group_rows(int seqs) { return seqs == 1 ? 128 : kDecoderThreads / seqs; }
// Fours of residual values that a thread takes over in the kernel for `seqs` sequences.
constexpr int decoder_residual_fours(int seqs) { return (seqs == 1 ? 32 : 128) / kDecoderWarps; }
// A last tile of at most half a tile's rows is halved where the plan halves: its pieces have twice
// the bytes of each row, the second half where the high rows of a whole tile are.
constexpr bool decoder_halves_last(int64_t rows) {
  return rows > 0 && (rows + kDecoderTile - 1) % kDecoderTile < kDecoderTile / 2;
}
// Bytes of a row in a piece.
constexpr int decoder_piece_span(bool halved) {
  return halved ? 2 * kDecoderPieceBytes : kDecoderPieceBytes;
}
// What a piece has of a tile's rows: their next low_bytes in `low` rows, and in `high` rows, 8
// places further in the ring, high_bytes: of other rows, or in a halved tile the next ones of the
// same.
struct DecoderPieceRows {
  int low, high, low_bytes, high_bytes;
};
// rows: of the tile. left: bytes of each that are not yet copied.
constexpr DecoderPieceRows decoder_piece_rows(int rows, bool halved, int left) {
  constexpr int kHalf = kDecoderTile / 2, kBytes = kDecoderPieceBytes;
  const int low = rows < kHalf ? rows : kHalf, bytes = left < kBytes ? left : kBytes;
  if (!halved) return {low, rows - low, bytes, bytes};
  return {low, low, bytes, left <= kBytes ? 0 : left < 2 * kBytes ? left - kBytes : kBytes};
}
// Place of a layer's exchanged word `i`, in words: eight of each line of 128 bytes. What all blocks
// ask for at the same time is then in more places of the cache.
constexpr int decoder_word_place(int i) { return i / 8 * 32 + i % 8; }
// Layers whose exchanged words have places of their own: those of one layer are withdrawn in the
// next one, and their places taken in the third.
inline constexpr int kDecoderRounds = 3;

// One block for each multiprocessor, all of them resident: they exchange activations. Block b owns
// the rows [b rows / blocks, (b + 1) rows / blocks) of each matrix, of in_proj those of its
// channels, which come in pairs.
struct DecoderStepPlan {
  bool usable = false;
  int blocks = 0;
  int seqs = 0;  // of a launch, at most: 1 or kDecoderMaxSeqs
  // A block's weights of a layer are more than the ring holds: what it reads beside them waits for
  // memory, too, and in bf16 the layer does.
  bool streams = false;
  int64_t max_channels = 0, max_out_rows = 0;  // of a block: of d_inner, of d_model
  // Elements of a row of the vectors that matrices are multiplied with: of the normed residual, of
  // u and y.
  int64_t narrow_stride = 0, wide_stride = 0;
  size_t shared_bytes = 0;
  int64_t exchange_words = 0;  // of global memory: places of all that blocks publish
};

// Numbers of the first words of what is exchanged in a layer, for `seqs` sequences, how many words
// there are, and places for them.
struct DecoderExchange {
  int64_t residual, u, x_dbl, y, words, places;
  static DecoderExchange of(const DecoderShape&, int seqs);
};

// Byte offsets into a block's shared memory.
struct DecoderShared {
  size_t ring, barriers, narrow, wide, scale, partial, sums, x_dbl, gate, u, residual, shapes,
      slots, layers, bytes;
  static DecoderShared of(const DecoderShape&, const DecoderStepPlan&);
};

DecoderStepPlan plan_decoder_step(const DecoderShape&, int multiprocessors, size_t shared_bytes);

}  // namespace krait::cuda
