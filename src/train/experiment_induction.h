// Induction heads (arXiv 2312.00752, section 4.1.2 and table 11), with a special induction token S:
//   r r S M r r r .. r S -> M        r, M: random tokens of the vocabulary; M must be recalled when
//   S comes again
// The loss is on the last token only. Solving it needs a state that takes up M when it follows S
// and then ignores everything else: selection. It is learned on short sequences and asked for on
// much longer ones.
#pragma once

#include <cstdint>
#include <functional>

#include "ops/engine.h"

namespace krait {

struct InductionSettings {
  int64_t vocab_size = 16;  // ordinary tokens; S is one more
  int64_t d_model = 32, n_layer = 2, d_state = 8;
  // Of the initialization. With the paper's dt_min, 0.001, the state lasts for 64 tokens without
  // selection, so short sequences do not teach the model to ignore what lies between.
  double dt_min = 0.01, dt_max = 0.1;
  bool selective = true;  // false: delta, B and C do not depend on the input
  int64_t length = 64;  // of the training sequences, the last S included; S stands somewhere in the
                        // first max_position
  int64_t max_position = 10;
  int64_t batch_size = 16;
  int64_t max_steps = 1500;
  double lr = 1e-2;  // constant, then linearly to zero over the last 30 % of the steps
  uint64_t seed = 1;
  int threads = 0;
  // Steps over which the length of the sequences grows from 8 to `length` (a curriculum); 0: none.
  int64_t growth_steps = 100;
};

struct InductionResult {
  int64_t steps = 0;
  double accuracy = 0;       // at the training length
  double long_accuracy = 0;  // at 16 times that length
};

// progress: called every 50 steps with (step, mean loss since the last call, accuracy at the
// training length); may be empty.
InductionResult run_induction(const Engine& engine, const InductionSettings& settings,
                              const std::function<void(int64_t, double, double)>& progress = {});

}  // namespace krait
