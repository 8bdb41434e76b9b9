// The shape of a Mamba language model, and config.json in its two dialects: that of transformers
// ("model_type": "mamba") and that of state-spaces ("ssm_cfg"). The keys and their defaults:
// docs/formats.md.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"

namespace krait {

enum class Dialect { hf, state_spaces };

Dialect dialect_from_name(const std::string& name);  // "hf" or "state-spaces"; throws Error

struct Config {
  int64_t vocab_size = 0;  // rows of the embedding, padding included
  int64_t d_model = 0;
  int64_t n_layer = 0;
  int64_t d_inner = 0;
  int64_t d_state = 16;
  int64_t d_conv = 4;
  int64_t dt_rank = 0;
  float norm_eps = 1e-5f;
  bool use_bias = false;  // in_proj and out_proj
  bool use_conv_bias = true;
  bool tie_embeddings = true;    // the head is the embedding
  bool residual_in_fp32 = true;  // else the residual stream has the type of the activations

  std::optional<int32_t> bos_token_id, pad_token_id;
  std::vector<int32_t> eos_token_ids;

  // Initialization (init.h).
  double dt_min = 0.001, dt_max = 0.1, dt_init_floor = 1e-4, dt_scale = 1.0;
  double initializer_range = 0.02;  // standard deviation of the embedding (and of an untied head)

  // Controls that turn selection off, one parameter at a time: delta, B or C no longer depend on
  // the input. Not of the paper's models; written to config.json as krait_selective_* only where
  // false.
  bool selective_delta = true, selective_B = true, selective_C = true;
  bool selective() const { return selective_delta && selective_B && selective_C; }

  // Columns of x_proj's output: dt (dt_rank), then B, then C (d_state each), those that are
  // selective.
  int64_t x_proj_size() const {
    return (selective_delta ? dt_rank : 0) +
           (int64_t{selective_B} + int64_t{selective_C}) * d_state;
  }
  // Bytes of the recurrent state of one sequence: n_layer x ((d_conv - 1) d_inner + d_inner
  // d_state) elements.
  int64_t state_bytes_per_sequence(DType dtype = DType::f32) const;

  bool operator==(const Config&) const = default;
};

// A new model's shape with the usual proportions: d_inner = 2 d_model, dt_rank = ceil(d_model /
// 16).
Config make_config(int64_t vocab_size, int64_t d_model, int64_t n_layer);
// The five published sizes, "130m" "370m" "790m" "1.4b" "2.8b" (arXiv 2312.00752, table 12);
// vocabulary 50280. Throws Error.
Config preset(const std::string& name);

// Throws Error when a field is outside what the ops can do; `where` names the source, e.g. the path
// of config.json.
void check_config(const Config& config, const std::string& where);

// Reads folder/config.json in either dialect. Errors name the file and the key.
Config read_config(const std::filesystem::path& folder);
Config config_from_json(std::string_view text, const std::string& where);

// Every key is written explicitly. dtype: of the weights that lie beside it. Throws Error for what
// the state-spaces dialect has no place for: another norm_eps than 1e-5, and the controls.
std::string config_to_json(const Config& config, Dialect dialect, DType dtype = DType::f32);

}  // namespace krait
