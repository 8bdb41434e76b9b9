// config.json in both dialects: what is read, what is refused and how, and that what is written
// reads back.
#include "model/config.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "model/parameters.h"

namespace krait {
namespace {

Config read(const std::string& text) { return config_from_json(text, "config.json"); }

// mamba-130m-hf as published.
constexpr const char* kHf =
    R"({"architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536,
  "d_model": 768, "eos_token_id": 0, "expand": 2, "fused_add_norm": true, "hidden_act": "silu", "hidden_size": 768,
  "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba", "n_layer": 24,
  "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": false,
  "residual_in_fp32": true, "rms_norm": true, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 0.0001,
  "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 48,
  "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0", "use_bias": false,
  "use_cache": true, "use_conv_bias": true, "vocab_size": 50280})";

constexpr const char* kStateSpaces =
    R"({"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": true,
  "residual_in_fp32": true, "fused_add_norm": true, "pad_vocab_size_multiple": 8})";

TEST(Config, ReadsThePublishedFolders) {
  Config expected = preset("130m");
  EXPECT_EQ(read(kStateSpaces), [&] {
    Config c = expected;  // that dialect has no tokens
    c.bos_token_id = c.pad_token_id = std::nullopt;
    c.eos_token_ids.clear();
    return c;
  }());
  expected.initializer_range = 0.1;
  EXPECT_EQ(read(kHf), expected);
}

TEST(Config, AbsentKeysHaveTransformersDefaults) {
  const Config c = read(R"({"model_type": "mamba"})");
  EXPECT_EQ(c.d_model, 768);
  EXPECT_EQ(c.n_layer, 32);
  EXPECT_EQ(c.d_inner, 1536);
  EXPECT_EQ(c.dt_rank, 48);
  EXPECT_EQ(c.vocab_size, 50280);
  EXPECT_TRUE(c.tie_embeddings && c.residual_in_fp32 && c.use_conv_bias && !c.use_bias);
}

TEST(Config, HonoursWhatIsOdd) {
  const Config c =
      read(R"({"model_type": "mamba", "hidden_size": 100, "expand": 16, "intermediate_size": 150,
    "time_step_rank": "auto", "eos_token_id": [1, 2], "bos_token_id": null, "conv_kernel": 2, "state_size": 5})");
  EXPECT_EQ(c.d_inner, 150);
  EXPECT_EQ(c.dt_rank, 7);
  EXPECT_EQ(c.eos_token_ids, (std::vector<int32_t>{1, 2}));
  EXPECT_FALSE(c.bos_token_id.has_value());
  const Config s = read(
      R"({"d_model": 100, "n_layer": 1, "vocab_size": 9, "pad_vocab_size_multiple": 16, "tie_embeddings": false,
    "ssm_cfg": {"layer": "Mamba1", "expand": 1.5, "d_state": 3, "dt_rank": 9, "bias": true, "conv_bias": false}})");
  EXPECT_EQ(s.vocab_size, 16);
  EXPECT_EQ(s.d_inner, 150);
  EXPECT_EQ(s.dt_rank, 9);
  EXPECT_TRUE(s.use_bias && !s.use_conv_bias && !s.tie_embeddings);
}

TEST(Config, RefusesWithOneClearLine) {
  const struct {
    const char *text, *message;
  } kCases[] = {
      {R"({})",
       "config.json: not the configuration of a Mamba model; expected \"model_type\": \"mamba\", "
       "or \"d_model\" and \"n_layer\""},
      {R"({"model_type": "mamba2"})",
       "config.json: model_type: not supported; expected \"mamba\", got \"mamba2\""},
      {R"({"model_type": "falcon_mamba"})",
       "config.json: model_type: not supported; expected \"mamba\", got \"falcon_mamba\""},
      {R"({"model_type": "mamba", "hidden_act": "gelu"})",
       "config.json: hidden_act: not supported; expected \"silu\", got \"gelu\""},
      {R"({"model_type": "mamba", "rms_norm": false})",
       "config.json: rms_norm: not supported; expected true (LayerNorm is not implemented), got "
       "false"},
      {R"({"model_type": "mamba", "conv_kernel": 5})",
       "config.json: d_conv: size out of range; expected 2 to 4, got 5"},
      {R"({"model_type": "mamba", "state_size": 257})",
       "config.json: d_state: size out of range; expected 1 to 256, got 257"},
      {R"({"model_type": "mamba", "hidden_size": 0})",
       "config.json: d_model: size out of range; expected 1 to 65536, got 0"},
      {R"({"model_type": "mamba", "hidden_size": -1})",
       "config.json: hidden_size: number out of range; expected 0 to 2147483648, got -1"},
      {R"({"model_type": "mamba", "hidden_size": 1.5})",
       "config.json: hidden_size: wrong type; expected a whole number, got the number 1.5"},
      {R"({"model_type": "mamba", "num_hidden_layers": 1000000})",
       "config.json: n_layer: size out of range; expected 1 to 4096, got 1000000"},
      {R"({"model_type": "mamba", "time_step_rank": "full"})",
       "config.json: time_step_rank: not supported; expected a whole number or \"auto\", got "
       "\"full\""},
      {R"({"model_type": "mamba", "use_bias": 1})",
       "config.json: use_bias: wrong type; expected true or false, got the whole number 1"},
      {R"({"model_type": "mamba", "eos_token_id": 50280})",
       "config.json: eos_token_id: token outside the vocabulary; expected 0 to 50279, got 50280"},
      {R"({"model_type": "mamba", "layer_norm_epsilon": 0})",
       "config.json: norm_eps: value out of range; expected above 0, below 1, got 0.000000"},
      {R"({"model_type": "mamba", "expand": 1e300})",
       "config.json: expand: not supported; expected above 0, at most 1024, got 1e+300"},
      {R"({"d_model": 8, "n_layer": 1, "rms_norm": false})",
       "config.json: rms_norm: not supported; expected true (LayerNorm is not implemented), got "
       "false"},
      {R"({"d_model": 8, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2"}})",
       "config.json: ssm_cfg: layer: not supported; expected \"Mamba1\" (other layers are not "
       "implemented), got \"Mamba2\""},
      {R"({"d_model": 8, "n_layer": 1, "ssm_cfg": {"layer": "Mamba3"}})",
       "config.json: ssm_cfg: layer: not supported; expected \"Mamba1\" (other layers are not "
       "implemented), got \"Mamba3\""},
      {R"({"d_model": 8, "n_layer": 1, "ssm_cfg": {"headdim": 64}})",
       "config.json: ssm_cfg: \"headdim\": unknown key; expected an argument of a Mamba-1 layer"},
      {R"({"d_model": 8, "n_layer": 1, "attn_layer_idx": [1]})",
       "config.json: attn_layer_idx: not supported; expected [] (attention layers are not "
       "implemented), got [1]"},
      {R"({"d_model": 8, "n_layer": 1, "d_intermediate": 16})",
       "config.json: d_intermediate: not supported; expected 0 (MLP layers are not implemented), "
       "got 16"},
      {R"([])", "config.json: wrong type; expected an object, got an array"},
  };
  for (const auto& c : kCases) {
    try {
      read(c.text);
      ADD_FAILURE() << c.text;
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()), c.message);
    }
  }
  EXPECT_THROW(read("{"), Error);
  EXPECT_THROW(preset("7b"), Error);
  EXPECT_THROW(read_config("/nonexistent"), Error);
}

TEST(Config, WhatIsWrittenReadsBack) {
  Config c = make_config(24, 20, 3);
  c.d_inner = 27;
  c.d_state = 7;
  c.d_conv = 2;
  c.dt_rank = 5;
  c.use_bias = true;
  c.use_conv_bias = c.tie_embeddings = c.residual_in_fp32 = false;
  c.dt_min = 0.002;
  c.dt_max = 0.2;
  c.dt_init_floor = 3e-4;
  c.dt_scale = 2;
  EXPECT_EQ(read(config_to_json(c, Dialect::state_spaces)), c);
  c.norm_eps = 3e-6f;
  c.selective_B = false;
  c.initializer_range = 0.3;
  c.pad_token_id = 3;
  for (const std::vector<int32_t>& eos : std::vector<std::vector<int32_t>>{{}, {7}, {1, 2}}) {
    c.eos_token_ids = eos;
    EXPECT_EQ(read(config_to_json(c, Dialect::hf, DType::bf16)), c);
  }
  EXPECT_THROW(config_to_json(c, Dialect::state_spaces), Error);  // no place for norm_eps
  for (bool Config::*const control :
       {&Config::selective_delta, &Config::selective_B, &Config::selective_C}) {
    Config other = make_config(8, 16, 1);
    other.*control = false;
    EXPECT_THROW(config_to_json(other, Dialect::state_spaces), Error);  // nor for these
    EXPECT_EQ(read(config_to_json(other, Dialect::hf)).*control, false);
  }
  for (int64_t d_model : {3, 7, 11, 768})
    for (int64_t d_inner = 1; d_inner < 50; ++d_inner) {
      Config odd = make_config(8, d_model, 1);
      odd.d_inner = d_inner;
      EXPECT_EQ(read(config_to_json(odd, Dialect::state_spaces)).d_inner, d_inner);
    }
}

TEST(Config, SizesOfThePublishedModels) {
  const std::pair<const char*, int64_t> kCounts[] = {{"130m", 129135360},
                                                     {"370m", 371516416},
                                                     {"790m", 793204224},
                                                     {"1.4b", 1372178432},
                                                     {"2.8b", 2768345600}};
  for (const auto& [name, count] : kCounts) {
    EXPECT_EQ(parameter_count(preset(name)), count) << name;
    int64_t sum = 0;
    for (const ParameterCount& group : parameter_counts(preset(name))) sum += group.count;
    EXPECT_EQ(sum, count);
  }
  EXPECT_EQ(preset("130m").state_bytes_per_sequence(), 24 * (1536 * 3 + 1536 * 16) * 4);
}

}  // namespace
}  // namespace krait
