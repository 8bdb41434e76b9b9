// Run file of `krait train`: TOML with the sections below. Every key can also be set as
// section.key=value; later settings win. Unknown keys, wrong types and values out of range are
// Errors that name file, key and what was expected. write_run_config gives a complete file (every
// key, with its meaning as a comment) from which the same run can be started again.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

struct ModelSettings {
  std::string
      init_from;        // folder of a model to fine-tune, which the keys below are then taken from
  std::string size;     // preset for d_model and n_layer: tiny, small, 130m, 370m, 790m, 1.4b, 2.8b
  int64_t d_model = 0;  // 0: from the preset, else 256
  int64_t n_layer = 0;  // 0: from the preset, else 6
  int64_t d_state = 16;
  int64_t d_conv = 4;
  int64_t expand = 2;
  int64_t d_inner = 0;     // 0: expand x d_model
  int64_t dt_rank = 0;     // 0: ceil(d_model / 16)
  int64_t vocab_size = 0;  // 0: the tokenizer's, rounded up to a multiple of 8
  bool tie_embeddings = true;
  bool selective_delta = true, selective_B = true, selective_C = true;
};

struct DataSettings {
  std::vector<std::string> train, validation;  // files and folders
  double validation_fraction = 0.05;  // of the training text, where no validation files are given
  std::string tokenizer =
      "bytes";                     // or the path of a tokenizer.json; init_from's, where it has one
  std::string mode = "documents";  // or "stream"
  std::string separator;           // splits a file into documents; empty: a file is one document
  int64_t seq_len = 256;
  int64_t batch_size = 16;
  bool shuffle = true;
  int64_t seed = 1;
};

struct OptimSettings {
  double lr = 3e-3, min_lr = 1e-5;
  double warmup_fraction = 0.1;
  int64_t warmup_steps = 0;  // 0: warmup_fraction of the run
  std::string schedule = "cosine";
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
  double clip = 1.0;  // 0: no clipping
  int64_t accumulation = 1;
};

struct TrainSettings {
  int64_t steps = 0;   // 0: until `seconds` are over
  double seconds = 0;  // 0: no time limit
  int64_t eval_every = 200;
  int64_t eval_tokens = 65536;
  int64_t save_every = 1000;
  int64_t keep_last = 2;
  int64_t log_every = 1;
  int64_t seed = 1;
  std::string device = "cpu";  // or "cuda"
  std::string dtype = "f32";
  std::string recompute = "none";
  int64_t threads = 0;  // 0: all cores
  std::vector<std::string> sample_prompts;
  int64_t sample_every = 0, sample_tokens = 128;
};

struct RunConfig {
  ModelSettings model;
  DataSettings data;
  OptimSettings optim;
  TrainSettings train;
};

// Reads `file` (empty path: defaults only), applies `settings` ("section.key=value") in order,
// checks everything, fills in the preset's sizes and makes paths absolute. Throws Error.
RunConfig load_run_config(const std::filesystem::path& file,
                          const std::vector<std::string>& settings);

// The same from text; `source` is the name used in errors.
RunConfig parse_run_config(std::string_view text, const std::string& source,
                           const std::vector<std::string>& settings);

// Complete TOML text. parse_run_config(write_run_config(c), ..) gives c again.
std::string write_run_config(const RunConfig& config);

// A digest of what a resumed run must keep: the model's shape and how the text is cut and ordered,
// without paths (the text itself has a digest of its own). Optimizer and run length may be changed
// on purpose.
uint32_t run_config_digest(const RunConfig& config);

// Throws Error, naming the key, where `config` differs from the run that wrote `file` (its
// config.toml) in what a resumed run must keep: what the digest is of, the initialization's seed
// and the type it computes in.
void check_resumable(const RunConfig& config, const std::filesystem::path& file);

}  // namespace krait
