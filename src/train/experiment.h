// A synthetic task (experiment_task.h) learned and tested, for one seed, in a run folder:
//   metrics.jsonl, tb/, step-N/, model/                 as a training run leaves them (trainer.h)
//   config.toml                                         the settings; no run file of krait train
//   result.json                                         once training is over: the tests so far
// The run is a function of its settings: stopped anywhere and resumed, it gives the same bits.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "train/experiment_score.h"
#include "train/learner.h"
#include "train/metrics.h"

namespace krait {

struct ExperimentSettings {
  TaskSettings task;
  int64_t d_model = 64, n_layer = 2, d_state = 16;
  double dt_min = 0.001, dt_max = 0.1;  // of the initialization
  bool selective = true;  // false, the control: delta, B and C do not depend on the input
  int64_t batch_size = 8;
  // Curriculum: steps over which the length grows from 8 to task.length, with more of the shorter
  // sequences in a step; 0: none.
  int64_t growth_steps = 0;
  double lr = 1e-3;
  double decay_fraction = 0;  // the last part of the steps, over which lr falls linearly to zero
  AdamWSettings adam;
  int64_t steps = 204800;  // at most
  uint64_t seed = 1;
  std::string dtype = "f32";  // of activations and matrix products, or bf16
  int threads = 0;

  int64_t log_every = 50, eval_every = 1000, save_every = 20000;  // steps
  int64_t eval_sequences = 256;
  // Share of right answers that every test must reach. Training ends when a validation reaches it
  // with a mean loss of at most max_loss, and then, on four times as many sequences of their own as
  // the test's, every length of the test does, with three quarters of the wrong answers that the
  // goal allows: right by a hair is not enough.
  double goal = 1, max_loss = 0.01;
  // Lengths of the test, ascending, and sequences at each: as many as make test_tokens, within the
  // limits.
  std::vector<int64_t> test_lengths;
  int64_t min_test_sequences = 16, max_test_sequences = 256;
  int64_t test_tokens = int64_t{1} << 24;
};

// The paper's.
ExperimentSettings paper_settings(Task task);
// Throws Error: values out of range.
void check_settings(const ExperimentSettings& settings);
// TOML in the sections of a run file, so that a report shows it.
std::string settings_toml(const ExperimentSettings& settings);
// Throws Error, naming the option of krait experiment, where the folder holds a checkpoint of a run
// whose config.toml has other settings: all but `threads`, log_every, save_every, more steps, goal
// and max_loss have to be those that its steps were made with.
void check_resumable(const ExperimentSettings& settings, const std::filesystem::path& folder);

struct ExperimentResult {
  uint64_t seed = 0;
  int64_t step = 0;               // steps trained
  double train_s = 0;             // over all sessions
  bool trained = false;           // the goal was reached or the steps are used up
  bool tested = false;            // at all lengths
  std::optional<TaskScore> last;  // of the validations
  std::vector<TaskScore> tests;

  bool reached(double goal) const;  // tested, and every length has reached it
};

struct ExperimentEvents {
  std::function<void(const StepMetrics&)> step;  // every log_every steps; loss: their mean
  std::function<void(int64_t step, const TaskScore&)> eval, test;
  std::function<void(const std::string&)> log;
  std::function<void(const std::string&)> warn;  // what people should see in any case
  // Asked between steps and between the pieces of a test: true ends the session with everything
  // saved.
  std::function<bool()> stop;
};

class Experiment {
 public:
  // resume: go on from the newest intact checkpoint of the folder, where there is one; else the
  // folder must not hold a run. Throws Error: settings other than the checkpoint's.
  Experiment(const Engine& engine, const ExperimentSettings& settings,
             const std::filesystem::path& folder, bool resume, ExperimentEvents events);
  ~Experiment();

  // Trains, then tests, until both are done or `stop` says so.
  ExperimentResult run();

 private:
  struct Run;
  std::unique_ptr<Run> run_;
};

}  // namespace krait
