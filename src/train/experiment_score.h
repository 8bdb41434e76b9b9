// How well a model answers the questions of a synthetic task.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "model/language_model.h"
#include "train/experiment_task.h"

namespace krait {

struct TaskScore {
  int64_t length = 0, sequences = 0, answers = 0;
  int64_t right_answers = 0, right_sequences = 0;  // the likeliest token; all of a sequence's
  double loss = 0;                                 // mean over the answers, natural logarithm

  double token_accuracy() const {
    return static_cast<double>(right_answers) / static_cast<double>(answers);
  }
  double sequence_accuracy() const {
    return static_cast<double>(right_sequences) / static_cast<double>(sequences);
  }
};

struct TaskQuestions {
  int64_t length, sequences;
  uint64_t seed;
  Purpose purpose;
  int64_t stream;
};

// All sequences side by side, in chunks with their states carried: memory does not depend on the
// length. Waits for the answers. stop: asked between chunks; true ends it, and there is no score.
// Throws Error when answers are not finite.
std::optional<TaskScore> score_task(Context& ctx, const Weights& weights,
                                    const TaskSettings& settings, const TaskQuestions& questions,
                                    const std::function<bool()>& stop = {});

}  // namespace krait
