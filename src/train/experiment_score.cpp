#include "train/experiment_score.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "ops/elementwise.h"
#include "ops/mirrored_tensor.h"

namespace krait {
namespace {

// Of all sequences together: enough for a large GPU, and 0.2 GB of activations at width 64.
constexpr int64_t kChunkTokens = int64_t{1} << 16;

class Reader {
 public:
  Reader(Context& ctx, const Weights& w, const TaskSettings& s, const TaskQuestions& q)
      : ctx_(ctx),
        weights_(w),
        answers_(s.answers()),
        num_seqs_(q.sequences),
        state_(w.config, q.sequences, DType::f32, ctx.memory()),
        logits_(ctx, DType::f32, {answers_ * num_seqs_, w.config.vocab_size}) {
    for (int64_t i = 0; i < num_seqs_; ++i)
      sequences_.emplace_back(s, q.length, q.seed, q.purpose, q.stream, i);
    // A chunk holds all the answers of a sequence, if it is the last one.
    total_ = s.tokens_of(q.length);
    chunk_ = std::max({kChunkTokens / num_seqs_, answers_, int64_t{1}});
    tokens_ = MirroredTensor(ctx, DType::i32, {num_seqs_ * std::min(total_, chunk_ + answers_)}, 2);
    seq_start_ = MirroredTensor(ctx, DType::i32, {num_seqs_ + 1}, 2);
  }

  // All sequences; false: `stop` ended it. Then row(i, j) gives the logits of answer j of sequence
  // i.
  bool read_all(const std::function<bool()>& stop) {
    for (int64_t done = 0; done < total_;) {
      if (stop && stop()) return false;
      const int64_t left = total_ - done, take = left < chunk_ + answers_ ? left : chunk_;
      done += take;
      read(take, done == total_);
    }
    logits_.download(answers_ * num_seqs_);
    return true;
  }

  const float* row(int64_t sequence, int64_t answer) const {
    return logits_.host_ptr<float>() + (answer * num_seqs_ + sequence) * weights_.config.vocab_size;
  }
  const std::vector<int32_t>& answers(int64_t sequence) const {
    return sequences_[static_cast<size_t>(sequence)].answers();
  }

 private:
  void read(int64_t take, bool last) {
    int32_t* const tokens = tokens_.host_ptr<int32_t>();
    int32_t* const seq_start = seq_start_.host_ptr<int32_t>();
    for (int64_t i = 0; i < num_seqs_; ++i) {
      sequences_[static_cast<size_t>(i)].write({tokens + i * take, static_cast<size_t>(take)});
      seq_start[i + 1] = static_cast<int32_t>((i + 1) * take);
    }
    seq_start[0] = 0;
    const int64_t count = num_seqs_ * take, d_model = weights_.config.d_model;
    tokens_.upload(count);
    seq_start_.upload(num_seqs_ + 1);
    const Arena::Scope scope(ctx_.workspace());
    const Tensor hidden = ctx_.workspace().tensor(weights_.dtype, {count, d_model});
    forward(ctx_, weights_, {tokens_.view().slice(0, 0, count), seq_start_, {}}, &state_, hidden);
    if (!last) return;
    // One answer of all sequences at a time: rows that are `take` tokens apart.
    for (int64_t j = 0; j < answers_; ++j) {
      Tensor rows = hidden.slice(0, take - answers_ + j, count);
      rows.shape[0] = num_seqs_;
      rows.stride[0] = take * d_model;
      logits(ctx_, weights_, rows, logits_.view().slice(0, j * num_seqs_, (j + 1) * num_seqs_));
    }
  }

  Context& ctx_;
  const Weights& weights_;
  int64_t answers_, num_seqs_, total_ = 0, chunk_ = 0;  // total_, chunk_: tokens of a sequence
  std::vector<TaskSequence> sequences_;
  DecodeState state_;
  MirroredTensor tokens_, seq_start_, logits_;
};

}  // namespace

std::optional<TaskScore> score_task(Context& ctx, const Weights& weights,
                                    const TaskSettings& settings, const TaskQuestions& questions,
                                    const std::function<bool()>& stop) {
  Reader reader(ctx, weights, settings, questions);
  if (!reader.read_all(stop)) return std::nullopt;
  const int64_t vocab_size = weights.config.vocab_size;
  TaskScore score;
  score.length = questions.length;
  score.sequences = questions.sequences;
  score.answers = questions.sequences * settings.answers();
  for (int64_t i = 0; i < questions.sequences; ++i) {
    int64_t right = 0;
    for (int64_t j = 0; j < settings.answers(); ++j) {
      const float* const row = reader.row(i, j);
      const int32_t answer = reader.answers(i)[static_cast<size_t>(j)];
      const float* const best = std::max_element(row, row + vocab_size);
      double sum = 0;
      for (int64_t k = 0; k < vocab_size; ++k) sum += std::exp(double{row[k]} - double{*best});
      score.loss += std::log(sum) + double{*best} - double{row[answer]};
      right += best - row == answer ? 1 : 0;
    }
    score.right_answers += right;
    score.right_sequences += right == settings.answers() ? 1 : 0;
  }
  score.loss /= static_cast<double>(score.answers);
  if (!std::isfinite(score.loss))
    throw Error("the model's answers are not finite", name_of(settings.task));
  return score;
}

}  // namespace krait
