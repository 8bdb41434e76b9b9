// What a training run records: one JSON object per line in metrics.jsonl (non-finite numbers as
// null).
//   training    {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"}
//   validation  {"step", "tokens", "val_loss", "perplexity", "bits_per_byte", "val_tokens",
//   "elapsed_s"}; of a synthetic task (experiment.h) "accuracy" and "sequence_accuracy", and no
//   "bits_per_byte"
// loss and val_loss are means per predicted token, natural logarithm.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "train/append_file.h"
#include "train/tensorboard.h"

namespace krait {

struct StepMetrics {
  int64_t step = 0, tokens = 0;            // tokens: trained on since the run's beginning
  double loss = 0, lr = 0, grad_norm = 0;  // grad_norm: before clipping
  double tokens_per_s = 0, elapsed_s = 0;
};

struct EvalMetrics {
  int64_t step = 0, tokens = 0;
  double loss = 0, perplexity = 0, bits_per_byte = 0;
  int64_t scored_tokens = 0;
  double elapsed_s = 0;
  std::optional<double> accuracy = {}, sequence_accuracy = {};  // of a synthetic task
};

std::string to_json(const StepMetrics& m);  // with the newline
std::string to_json(const EvalMetrics& m);

// Whether the run's metrics.jsonl has a validation of this step.
bool validation_logged(const std::filesystem::path& run_folder, int64_t step);

// metrics.jsonl and tb/ of a run folder.
class MetricsWriter {
 public:
  // resume_step: lines of later steps, left by a run that went on after its last checkpoint, are
  // dropped, and so is an incomplete last line. 0: a new run; an existing metrics.jsonl is emptied.
  MetricsWriter(const std::filesystem::path& run_folder, int64_t resume_step);

  void write(const StepMetrics& m);
  void write(const EvalMetrics& m);

 private:
  std::optional<AppendFile> file_;
  TensorBoardWriter tensorboard_;
};

}  // namespace krait
