// Checkpoints of a training run: folders step-N in the run's folder. Each is a model that
// transformers loads (config.json, model.safetensors with the f32 masters, tokenizer.json unless
// the tokens are bytes) and, beside it, what the trainer needs to go on exactly where it stood:
// optimizer.safetensors (moments; in stream mode the rows' states) and trainer_state.json, which
// holds sizes and CRC-32C of all files and of itself.
//
// A checkpoint appears under its name only when it is complete and on disk: everything is written
// into a temporary folder and synced, the folder is renamed, the parent synced. There is no pointer
// to the latest one that could be wrong: the newest whose digests are right is found by looking.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "model/decode_state.h"
#include "model/weights.h"
#include "train/dataset.h"

namespace krait {

struct TrainerState {
  int64_t step = 0, tokens = 0;  // optimizer steps and tokens of the run so far
  DataCursor cursor;             // of the next batch
  double elapsed_s = 0;
  uint32_t config_digest = 0, text_digest = 0;
};

// The optimizer's part of a run in progress.
struct Moments {
  explicit Moments(const Config& config, Memory& memory = host_memory())
      : m(config, DType::f32, memory), v(config, DType::f32, memory) {}
  ParameterStore m, v;
};

struct Checkpoint {
  std::filesystem::path folder;
  TrainerState state;
};

// stream_state: null in documents mode. tokenizer: path of the tokenizer.json to copy; empty: none.
// Throws Error (a full disk); nothing is left behind then. Returns the folder.
std::filesystem::path save_checkpoint(const std::filesystem::path& run_folder,
                                      const TrainerState& state, const TrainableModel& model,
                                      const Moments& moments, const DecodeState* stream_state,
                                      const std::filesystem::path& tokenizer);

// Checks every digest. Throws Error that names the file: missing, of another length, changed.
Checkpoint open_checkpoint(const std::filesystem::path& folder);

// The newest intact checkpoint of a run; damaged ones are passed over, `warn` hears of each. None:
// nothing to resume.
std::optional<Checkpoint> latest_checkpoint(const std::filesystem::path& run_folder,
                                            const std::function<void(const std::string&)>& warn);

// Fills in everything; refresh the model afterwards. Throws Error when it is not of this model.
void load_checkpoint(const Checkpoint& checkpoint, TrainableModel& model, Moments& moments,
                     DecodeState* stream_state);

// Copies what generation needs of a checkpoint to run_folder/model; files that are there already
// are left alone. Throws Error.
void export_model(const std::filesystem::path& checkpoint, const std::filesystem::path& run_folder);

// Renames checkpoints of steps after `step` to abandoned-step-N: a run that goes on from `step`
// does not come from them.
void abandon_checkpoints(const std::filesystem::path& run_folder, int64_t step);

// Removes all but the newest `keep` checkpoints, and what interrupted saves have left.
void prune_checkpoints(const std::filesystem::path& run_folder, int64_t keep);

// Steps of the checkpoint folders that are there, ascending; not checked.
std::vector<int64_t> list_checkpoints(const std::filesystem::path& run_folder);

}  // namespace krait
