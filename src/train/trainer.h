// A training run from its settings to a folder:
//   config.toml      the resolved settings                metrics.jsonl, tb/   what was measured
//   (metrics.h) step-N/          checkpoints (checkpoint.h)           model/               the
//   model when the run ended or was interrupted,
//                                                                              for generation and
//                                                                              for transformers
// The run is a function of the settings and the text: stopped at any step and resumed, it gives the
// same bits as without the stop. (With a time limit alone, train.seconds, the schedule follows the
// clock, so there it is not.)
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "train/learner.h"
#include "train/metrics.h"
#include "train/run_config.h"

namespace krait {

// What the caller wants to hear; any may be empty. Called on the thread that trains.
struct TrainerEvents {
  std::function<void(const StepMetrics&)> step;  // every step
  std::function<void(const EvalMetrics&)> eval;
  std::function<void(const std::string&)> log;   // a line for people
  std::function<void(const std::string&)> warn;  // a line that people should see in any case
  std::function<void(int64_t step, const Weights&)>
      sample;  // train.sample_every steps have passed, or the run is over
};

struct TrainResult {
  int64_t step = 0;
  bool interrupted = false;
  bool logged = true;                       // false: nothing was left to train or to record
  std::optional<EvalMetrics> validation;    // the last
  std::filesystem::path model, checkpoint;  // folders
};

class Trainer {
 public:
  // resume: "" starts a new run (`folder` must not hold one), "auto" continues from the newest
  // intact checkpoint of `folder` or starts anew where there is none, else the folder of a
  // checkpoint. Throws Error: bad data, a model that does not fit, a folder that another process
  // trains in, settings or text other than the checkpoint's. Where that checkpoint leaves nothing
  // to train, the run's folder stays as it is, but for what a run killed at its end still lacks.
  Trainer(const RunConfig& config, const std::filesystem::path& folder, const std::string& resume,
          TrainerEvents events);
  // The same on an engine that is not one of train.device's.
  Trainer(const RunConfig& config, const std::filesystem::path& folder, const std::string& resume,
          TrainerEvents events, const Engine& engine);
  ~Trainer();

  const Config& model_config() const;
  const TrainingText& text() const;
  int64_t first_step() const;  // 0: a new run

  // Trains to the end, or until `stop` is set: then the step is finished (on a GPU also the next
  // one, which is queued already) and a checkpoint written.
  // Throws Error when loss or gradient are not finite (the optimizer is not applied then) or files
  // cannot be written.
  TrainResult run(const std::atomic<bool>& stop);

 private:
  struct Run;
  std::unique_ptr<Run> run_;
};

}  // namespace krait
