#include "train/experiment_task.h"

#include <algorithm>

#include "core/error.h"

namespace krait {
namespace {

uint64_t rng_stream(Purpose purpose, int64_t stream, int64_t number) {
  KRAIT_CHECK(stream >= 0 && stream < int64_t{1} << 40 && number >= 0 && number < 1 << 20);
  return static_cast<uint64_t>(purpose) << 60 | static_cast<uint64_t>(stream) << 20 |
         static_cast<uint64_t>(number);
}

}  // namespace

Task task_from_name(const std::string& name) {
  for (const Task task : {Task::selective_copying, Task::induction_heads})
    if (name == name_of(task)) return task;
  throw Error("no such experiment", "experiment", "selective-copying or induction-heads", name);
}

const char* name_of(Task task) {
  return task == Task::selective_copying ? "selective-copying" : "induction-heads";
}

int64_t TaskSettings::tokens_of(int64_t at_length) const {
  return task == Task::selective_copying ? at_length + 2 * data_tokens : at_length;
}

int64_t TaskSettings::answers() const { return task == Task::selective_copying ? data_tokens : 1; }

int64_t TaskSettings::embeddings() const {
  const int64_t tokens = task == Task::selective_copying ? vocab_size : vocab_size + 1;
  return (tokens + 7) / 8 * 8;
}

TaskSequence::TaskSequence(const TaskSettings& s, int64_t length, uint64_t seed, Purpose purpose,
                           int64_t stream, int64_t number)
    : task_(s.task), vocab_size_(s.vocab_size), rng_(seed, rng_stream(purpose, stream, number)) {
  if (task_ == Task::selective_copying) {
    end_ = length + s.data_tokens;  // of the part before the markers
    while (static_cast<int64_t>(places_.size()) < s.data_tokens) {
      const int64_t place = draw(end_);
      const auto at = std::lower_bound(places_.begin(), places_.end(), place);
      if (at == places_.end() || *at != place) places_.insert(at, place);
    }
    for (int64_t i = 0; i < s.data_tokens; ++i) answers_.push_back(1 + draw(vocab_size_ - 2));
  } else {
    end_ = length - 1;  // the last S
    places_.push_back(draw(std::min(s.max_position, length - 2)));
    answers_.push_back(draw(vocab_size_));
  }
}

// A product instead of a remainder: quicker, and off by less than count / 2^32.
int32_t TaskSequence::draw(int64_t count) {
  return static_cast<int32_t>(uint64_t{rng_.next_u32()} * static_cast<uint64_t>(count) >> 32);
}

void TaskSequence::write(std::span<int32_t> tokens) {
  task_ == Task::selective_copying ? write_copying(tokens) : write_induction(tokens);
  position_ += static_cast<int64_t>(tokens.size());
}

void TaskSequence::write_copying(std::span<int32_t> tokens) {
  const auto count = static_cast<int64_t>(tokens.size());
  const int64_t noise = std::clamp(end_ - position_, int64_t{0}, count);
  std::fill_n(tokens.begin(), noise, 0);
  std::fill(tokens.begin() + noise, tokens.end(), static_cast<int32_t>(vocab_size_ - 1));
  for (size_t i = 0; i < places_.size(); ++i) {
    const int64_t at = places_[i] - position_;
    if (at >= 0 && at < count) tokens[static_cast<size_t>(at)] = answers_[i];
  }
}

void TaskSequence::write_induction(std::span<int32_t> tokens) {
  for (int32_t& token : tokens) token = draw(vocab_size_);
  const auto put = [&](int64_t place, int32_t token) {
    const int64_t at = place - position_;
    if (at >= 0 && at < static_cast<int64_t>(tokens.size()))
      tokens[static_cast<size_t>(at)] = token;
  };
  const auto special = static_cast<int32_t>(vocab_size_);
  put(places_[0], special);
  put(places_[0] + 1, answers_[0]);
  put(end_, special);
}

void make_batch(const TaskSettings& s, int64_t length, int64_t count, uint64_t seed,
                Purpose purpose, int64_t stream, Batch& batch) {
  const int64_t tokens = s.tokens_of(length), answers = s.answers();
  batch.clear();
  batch.tokens.resize(static_cast<size_t>(count * tokens));
  batch.targets.assign(static_cast<size_t>(count * tokens), -1);
  for (int64_t i = 0; i < count; ++i) {
    TaskSequence sequence(s, length, seed, purpose, stream, i);
    sequence.write({batch.tokens.data() + i * tokens, static_cast<size_t>(tokens)});
    std::copy(sequence.answers().begin(), sequence.answers().end(),
              batch.targets.begin() + (i + 1) * tokens - answers);
    batch.seq_start.push_back(static_cast<int32_t>((i + 1) * tokens));
  }
  batch.target_count = count * answers;
}

}  // namespace krait
