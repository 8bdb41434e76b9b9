// Batches of packed sequences for training and validation. Their order is a function of (corpus,
// settings, seed, cursor), so a run that stops and resumes sees the very same batches.
#pragma once

#include <cstdint>
#include <vector>

#include "core/rng.h"
#include "train/corpus.h"

namespace krait {

struct Batch {
  std::vector<int32_t> tokens,
      targets;                     // (tokens)  target: the next token of the document; -1: none
  std::vector<int32_t> seq_start;  // (num_seqs + 1)
  bool reset_state = false;        // stream: the rows begin anew; their states must be zero
  int64_t target_count = 0;        // targets that are not -1

  int64_t num_seqs() const { return static_cast<int64_t>(seq_start.size()) - 1; }
  void clear();
  // Appends tokens[begin, end) of the corpus with the tokens after each as targets.
  void append(const Corpus& corpus, int64_t begin, int64_t end);
};

// Where the next batch begins. epoch: passes over the text; piece: documents: sequence number in
// the epoch's order, stream: segment of the rows; offset: tokens of that piece already used.
struct DataCursor {
  int64_t epoch = 0, piece = 0, offset = 0;
  bool operator==(const DataCursor&) const = default;
};

// Endless. Every batch has exactly batch_size x seq_len tokens.
//   documents: in each epoch every document is cut into pieces of at most seq_len tokens (with
//   shuffle the first cut is at random),
//     the pieces are taken in a random order, or in order, and packed; the piece at a batch's end
//     is continued in the next batch as a sequence of its own. Each prediction of each document
//     occurs exactly once in an epoch.
//   stream: all text end to end in batch_size rows of equal length; a batch is the next seq_len
//   tokens of each row, row r in slot r.
//     A remainder shorter than batch_size x seq_len is left out, at a place that changes with the
//     epoch (with shuffle).
class BatchSource {
 public:
  // The corpus must outlive this. Throws Error when it has fewer than batch_size x seq_len
  // predictions.
  BatchSource(const Corpus& corpus, const DataSettings& settings);

  void next(Batch& batch);
  const DataCursor& cursor() const { return cursor_; }
  void seek(const DataCursor& cursor);  // throws Error when it is not a place in this text

 private:
  struct Piece {
    int64_t begin, end;
  };
  void begin_epoch();
  void next_documents(Batch& batch);
  void next_stream(Batch& batch);
  int64_t pieces() const;

  const Corpus& corpus_;
  bool stream_, shuffle_;
  int64_t seq_len_, batch_size_;
  uint64_t seed_;
  DataCursor cursor_;
  std::vector<Piece> pieces_;                // documents: of this epoch, in order of use
  int64_t segments_ = 0, stream_begin_ = 0;  // stream
};

// Validation text, once, in order: pieces of seq_len as in training (documents), or rows with the
// state carried (stream). max_tokens: at most about so many tokens, spread over the text
// (documents) or from its beginning (stream); 0: all.
class ValidationSource {
 public:
  ValidationSource(const Corpus& corpus, const DataSettings& settings, int64_t max_tokens);

  bool next(Batch& batch);                // false: no more
  int64_t rows() const { return rows_; }  // states needed in stream mode

 private:
  const Corpus& corpus_;
  bool stream_;
  int64_t seq_len_, batch_size_;
  std::vector<std::pair<int64_t, int64_t>> pieces_;  // documents
  size_t next_piece_ = 0;
  int64_t rows_ = 0, row_length_ = 0, row_position_ = 0;  // stream
};

}  // namespace krait
