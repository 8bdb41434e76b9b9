#include "train/dataset.h"

#include <algorithm>

#include "core/error.h"

namespace krait {
namespace {

// Random streams of one seed.
constexpr uint64_t kShuffleStream = 1, kCutStream = 2, kStreams = 16;

}  // namespace

void Batch::clear() {
  tokens.clear();
  targets.clear();
  seq_start.assign(1, 0);
  reset_state = false;
  target_count = 0;
}

void Batch::append(const Corpus& corpus, int64_t begin, int64_t end) {
  tokens.insert(tokens.end(), corpus.tokens.begin() + begin, corpus.tokens.begin() + end);
  targets.insert(targets.end(), corpus.tokens.begin() + begin + 1, corpus.tokens.begin() + end + 1);
  seq_start.push_back(static_cast<int32_t>(tokens.size()));
  target_count += end - begin;
}

BatchSource::BatchSource(const Corpus& corpus, const DataSettings& settings)
    : corpus_(corpus),
      stream_(settings.mode == "stream"),
      shuffle_(settings.shuffle),
      seq_len_(settings.seq_len),
      batch_size_(settings.batch_size),
      seed_(static_cast<uint64_t>(settings.seed)) {
  const int64_t available =
      stream_ ? std::max<int64_t>(0, corpus.size() - 1) : corpus.predictions();
  if (available < batch_size_ * seq_len_) {
    const std::string all = std::to_string(corpus.size()) + " tokens";
    throw Error("too little training text for one batch", "data.train",
                "at least batch_size x seq_len = " + std::to_string(batch_size_ * seq_len_) +
                    " tokens with another behind them" + (stream_ ? "" : " in their document"),
                std::to_string(available) + " among " + all +
                    (stream_ ? "" : " in " + std::to_string(corpus.documents()) + " document(s)"));
  }
  begin_epoch();
}

int64_t BatchSource::pieces() const {
  return stream_ ? segments_ : static_cast<int64_t>(pieces_.size());
}

void BatchSource::begin_epoch() {
  const auto epoch = static_cast<uint64_t>(cursor_.epoch);
  Rng cuts(seed_, epoch * kStreams + kCutStream);
  if (stream_) {
    segments_ = (corpus_.size() - 1) / (batch_size_ * seq_len_);
    const int64_t left_out = corpus_.size() - 1 - segments_ * batch_size_ * seq_len_;
    stream_begin_ =
        shuffle_ ? static_cast<int64_t>(cuts.below(static_cast<uint64_t>(left_out) + 1)) : 0;
    return;
  }
  pieces_.clear();
  for (int64_t d = 0; d < corpus_.documents(); ++d) {
    const int64_t last = corpus_.start[d + 1] - 1;  // has no next token
    int64_t begin = corpus_.start[d];
    if (shuffle_ && last - begin > seq_len_) {
      const int64_t first = static_cast<int64_t>(cuts.below(static_cast<uint64_t>(seq_len_)));
      if (first > 0) pieces_.push_back({begin, begin + first});
      begin += first;
    }
    for (; begin < last; begin += seq_len_)
      pieces_.push_back({begin, std::min(begin + seq_len_, last)});
  }
  if (!shuffle_) return;
  Rng order(seed_, epoch * kStreams + kShuffleStream);
  for (size_t i = pieces_.size(); i > 1; --i) std::swap(pieces_[i - 1], pieces_[order.below(i)]);
}

void BatchSource::seek(const DataCursor& cursor) {
  const auto fail = [] { throw Error("no such place in the training text", "data cursor"); };
  if (cursor.epoch < 0 || cursor.piece < 0 || cursor.offset < 0) fail();
  cursor_ = cursor;
  begin_epoch();
  if (cursor.piece >= pieces()) fail();
  const int64_t length = stream_ ? 1 : pieces_[cursor.piece].end - pieces_[cursor.piece].begin;
  if (cursor.offset >= length) fail();
}

void BatchSource::next(Batch& batch) {
  batch.clear();
  if (stream_) {
    next_stream(batch);
  } else {
    next_documents(batch);
  }
}

void BatchSource::next_documents(Batch& batch) {
  int64_t room = batch_size_ * seq_len_;
  while (room > 0) {
    const Piece piece = pieces_[cursor_.piece];
    const int64_t begin = piece.begin + cursor_.offset, length = std::min(piece.end - begin, room);
    batch.append(corpus_, begin, begin + length);
    room -= length;
    cursor_.offset += length;
    if (begin + length < piece.end) continue;
    cursor_.offset = 0;
    if (++cursor_.piece == pieces()) {
      cursor_ = {cursor_.epoch + 1, 0, 0};
      begin_epoch();
    }
  }
}

void BatchSource::next_stream(Batch& batch) {
  batch.reset_state = cursor_.piece == 0;
  for (int64_t row = 0; row < batch_size_; ++row) {
    const int64_t begin = stream_begin_ + (row * segments_ + cursor_.piece) * seq_len_;
    batch.append(corpus_, begin, begin + seq_len_);
  }
  if (++cursor_.piece == segments_) {
    cursor_ = {cursor_.epoch + 1, 0, 0};
    begin_epoch();
  }
}

ValidationSource::ValidationSource(const Corpus& corpus, const DataSettings& settings,
                                   int64_t max_tokens)
    : corpus_(corpus),
      stream_(settings.mode == "stream"),
      seq_len_(settings.seq_len),
      batch_size_(settings.batch_size) {
  if (stream_) {
    int64_t available = std::max<int64_t>(0, corpus.size() - 1);
    if (max_tokens > 0) available = std::min(available, max_tokens);
    rows_ = std::clamp<int64_t>(available / seq_len_, 1, batch_size_);
    row_length_ = available / rows_;
    return;
  }
  for (int64_t d = 0; d < corpus.documents(); ++d) {
    const int64_t last = corpus.start[d + 1] - 1;
    for (int64_t begin = corpus.start[d]; begin < last; begin += seq_len_) {
      pieces_.emplace_back(begin, std::min(begin + seq_len_, last));
    }
  }
  const size_t all = pieces_.size(),
               wanted = static_cast<size_t>((max_tokens + seq_len_ - 1) / seq_len_);
  if (max_tokens > 0 && wanted < all) {
    for (size_t i = 0; i < wanted; ++i) pieces_[i] = pieces_[i * all / wanted];
    pieces_.resize(wanted);
  }
}

bool ValidationSource::next(Batch& batch) {
  batch.clear();
  if (stream_) {
    const int64_t length = std::min(seq_len_, row_length_ - row_position_);
    if (length <= 0) return false;
    batch.reset_state = row_position_ == 0;
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t begin = row * row_length_ + row_position_;
      batch.append(corpus_, begin, begin + length);
    }
    row_position_ += length;
    return true;
  }
  for (int64_t room = batch_size_ * seq_len_; next_piece_ < pieces_.size(); ++next_piece_) {
    const auto [begin, end] = pieces_[next_piece_];
    if (end - begin > room) break;
    batch.append(corpus_, begin, end);
    room -= end - begin;
  }
  return batch.num_seqs() > 0;
}

}  // namespace krait
