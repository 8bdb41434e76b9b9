// config.json in its two dialects. Sources: transformers' MambaConfig (configuration_mamba.py) and
// mamba_ssm's MambaConfig (models/config_mamba.py, dataclass defaults) with the arguments of its
// Mamba module (modules/mamba_simple.py), in ssm_cfg.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/mapped_file.h"
#include "formats/json.h"
#include "model/config.h"

namespace krait {
namespace {

using nlohmann::json;

constexpr int64_t kMaxSize = int64_t{1} << 31;  // check_config has the real limits

// Reads members of one object; absent or null ones have the dialect's default.
struct Fields {
  const json& object;
  std::string where;

  bool has(const char* key) const { return has_field(object, key, where); }
  int64_t integer(const char* key, std::optional<int64_t> standard = {}) const {
    return standard && !has(key) ? *standard : get_int(object, key, where, 0, kMaxSize);
  }
  bool boolean(const char* key, bool standard) const {
    return has(key) ? get_bool(object, key, where) : standard;
  }
  double number(const char* key, double standard) const {
    return has(key) ? get_number(object, key, where) : standard;
  }
  std::string text(const char* key, const char* standard) const {
    return has(key) ? get_string(object, key, where) : standard;
  }
  void require(bool ok, const char* key, const std::string& expected) const {
    if (!ok)
      throw Error("not supported", where + ": " + key, expected,
                  has(key) ? object.at(key).dump() : "nothing");
  }
  int64_t dt_rank(const char* key, int64_t d_model) const {
    if (!has(key)) return (d_model + 15) / 16;
    if (!object.at(key).is_string()) return get_int(object, key, where, 1, kMaxSize);
    require(object.at(key) == "auto", key, "a whole number or \"auto\"");
    return (d_model + 15) / 16;
  }
  // As transformers and mamba_ssm compute it: int(expand * d_model).
  int64_t expanded(int64_t d_model) const {
    const double expand = number("expand", 2);
    require(expand > 0 && expand <= 1024, "expand", "above 0, at most 1024");
    return static_cast<int64_t>(expand * static_cast<double>(d_model));
  }
};

std::optional<int32_t> token_id(const Fields& f, const char* key, std::optional<int32_t> standard) {
  if (!f.object.contains(key)) return standard;
  if (!f.has(key)) return std::nullopt;  // null: the model has none
  return static_cast<int32_t>(
      get_int(f.object, key, f.where, 0, std::numeric_limits<int32_t>::max()));
}

// eos_token_id may be a number or a list of numbers.
std::vector<int32_t> token_ids(const Fields& f, const char* key) {
  if (f.has(key) && f.object.at(key).is_array()) {
    std::vector<int32_t> ids;
    for (const json& id : f.object.at(key)) {
      const json wrapped = {{key, id}};
      ids.push_back(*token_id(Fields{wrapped, f.where}, key, {}));
    }
    return ids;
  }
  const std::optional<int32_t> id = token_id(f, key, 0);
  return id ? std::vector<int32_t>{*id} : std::vector<int32_t>{};
}

void read_controls(const Fields& f, Config& c) {
  c.selective_delta = f.boolean("krait_selective_delta", true);
  c.selective_B = f.boolean("krait_selective_B", true);
  c.selective_C = f.boolean("krait_selective_C", true);
}

Config read_hf(const Fields& f) {
  f.require(f.text("hidden_act", "silu") == "silu", "hidden_act", "\"silu\"");
  f.require(f.boolean("rms_norm", true), "rms_norm", "true (LayerNorm is not implemented)");
  Config c;
  c.vocab_size = f.integer("vocab_size", 50280);
  c.d_model = f.integer("hidden_size", 768);
  c.n_layer = f.integer("num_hidden_layers", 32);
  c.d_state = f.integer("state_size", 16);
  c.d_conv = f.integer("conv_kernel", 4);
  c.d_inner = f.has("intermediate_size") ? f.integer("intermediate_size") : f.expanded(c.d_model);
  c.dt_rank = f.dt_rank("time_step_rank", c.d_model);
  c.norm_eps = static_cast<float>(f.number("layer_norm_epsilon", 1e-5));
  c.use_bias = f.boolean("use_bias", false);
  c.use_conv_bias = f.boolean("use_conv_bias", true);
  c.tie_embeddings = f.boolean("tie_word_embeddings", true);
  c.residual_in_fp32 = f.boolean("residual_in_fp32", true);
  c.bos_token_id = token_id(f, "bos_token_id", 0);
  c.pad_token_id = token_id(f, "pad_token_id", 0);
  c.eos_token_ids = token_ids(f, "eos_token_id");
  c.dt_min = f.number("time_step_min", c.dt_min);
  c.dt_max = f.number("time_step_max", c.dt_max);
  c.dt_init_floor = f.number("time_step_floor", c.dt_init_floor);
  c.dt_scale = f.number("time_step_scale", c.dt_scale);
  c.initializer_range = f.number("initializer_range", 0.1);
  read_controls(f, c);
  return c;
}

void read_ssm_cfg(const Fields& f, Config& c) {
  for (const auto& [key, value] : f.object.items()) {
    constexpr const char* kKnown[] = {
        "layer",   "d_state",       "d_conv",   "expand", "dt_rank",   "dt_min",       "dt_max",
        "dt_init", "dt_init_floor", "dt_scale", "bias",   "conv_bias", "use_fast_path"};
    bool known = false;
    for (const char* name : kKnown) known = known || key == name;
    if (!known)
      throw Error("unknown key", f.where + ": " + in_quotes(key), "an argument of a Mamba-1 layer");
  }
  f.require(f.text("layer", "Mamba1") == "Mamba1" || f.text("layer", "") == "Mamba", "layer",
            "\"Mamba1\" (other layers are not implemented)");
  c.d_state = f.integer("d_state", 16);
  c.d_conv = f.integer("d_conv", 4);
  c.d_inner = f.expanded(c.d_model);
  c.dt_rank = f.dt_rank("dt_rank", c.d_model);
  c.use_bias = f.boolean("bias", false);
  c.use_conv_bias = f.boolean("conv_bias", true);
  c.dt_min = f.number("dt_min", c.dt_min);
  c.dt_max = f.number("dt_max", c.dt_max);
  c.dt_init_floor = f.number("dt_init_floor", c.dt_init_floor);
  c.dt_scale = f.number("dt_scale", c.dt_scale);
}

Config read_state_spaces(const Fields& f) {
  f.require(f.boolean("rms_norm", true), "rms_norm", "true (LayerNorm is not implemented)");
  f.require(f.integer("d_intermediate", 0) == 0, "d_intermediate",
            "0 (MLP layers are not implemented)");
  f.require(!f.has("attn_layer_idx") || get_array(f.object, "attn_layer_idx", f.where).empty(),
            "attn_layer_idx", "[] (attention layers are not implemented)");
  Config c;
  c.d_model = f.integer("d_model", 2560);
  c.n_layer = f.integer("n_layer", 64);
  const int64_t vocab_size = f.integer("vocab_size", 50277);
  const int64_t multiple = std::max<int64_t>(f.integer("pad_vocab_size_multiple", 8), 1);
  c.vocab_size = (vocab_size + multiple - 1) / multiple * multiple;
  c.residual_in_fp32 = f.boolean("residual_in_fp32", true);
  c.tie_embeddings = f.boolean("tie_embeddings", true);
  const json none = json::object();
  const bool has_ssm_cfg = f.has("ssm_cfg");
  read_ssm_cfg(
      {has_ssm_cfg ? get_object(f.object, "ssm_cfg", f.where) : none, f.where + ": ssm_cfg"}, c);
  read_controls(f, c);
  return c;
}

// The shortest decimal that reads back as this float: 1e-5, not 9.999999747378752e-06.
double shortest(float value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  double result = 0;
  std::from_chars(text, end, result);
  return result;
}

json token_json(std::optional<int32_t> token) { return token ? json(*token) : json(nullptr); }

json hf_json(const Config& c, DType dtype) {
  json j;
  j["architectures"] = {"MambaForCausalLM"};
  j["model_type"] = "mamba";
  j["vocab_size"] = c.vocab_size;
  j["hidden_size"] = c.d_model;
  j["num_hidden_layers"] = c.n_layer;
  j["intermediate_size"] = c.d_inner;
  j["expand"] = (c.d_inner + c.d_model - 1) / c.d_model;  // intermediate_size is what counts
  j["state_size"] = c.d_state;
  j["conv_kernel"] = c.d_conv;
  j["time_step_rank"] = c.dt_rank;
  j["layer_norm_epsilon"] = shortest(c.norm_eps);
  j["use_bias"] = c.use_bias;
  j["use_conv_bias"] = c.use_conv_bias;
  j["hidden_act"] = "silu";
  j["residual_in_fp32"] = c.residual_in_fp32;
  j["tie_word_embeddings"] = c.tie_embeddings;
  j["bos_token_id"] = token_json(c.bos_token_id);
  j["pad_token_id"] = token_json(c.pad_token_id);
  j["eos_token_id"] = c.eos_token_ids.empty()       ? json(nullptr)
                      : c.eos_token_ids.size() == 1 ? json(c.eos_token_ids[0])
                                                    : json(c.eos_token_ids);
  j["time_step_min"] = c.dt_min;
  j["time_step_max"] = c.dt_max;
  j["time_step_floor"] = c.dt_init_floor;
  j["time_step_scale"] = c.dt_scale;
  j["time_step_init_scheme"] = "random";
  j["initializer_range"] = c.initializer_range;
  // false: transformers divides out_proj by sqrt(n_layer) when it loads a folder that says true.
  j["rescale_prenorm_residual"] = false;
  j["use_cache"] = true;
  j["torch_dtype"] = dtype == DType::bf16  ? "bfloat16"
                     : dtype == DType::f16 ? "float16"
                                           : "float32";
  return j;
}

// mamba_ssm computes d_inner = int(expand * d_model).
json expand_json(const Config& c) {
  if (c.d_inner % c.d_model == 0) return c.d_inner / c.d_model;
  double expand = static_cast<double>(c.d_inner) / static_cast<double>(c.d_model);
  while (static_cast<int64_t>(expand * static_cast<double>(c.d_model)) < c.d_inner)
    expand = std::nextafter(expand, 2 * expand);
  return expand;
}

// Only keys that mamba_ssm knows: it passes them all to a dataclass.
json state_spaces_json(const Config& c) {
  if (c.norm_eps != 1e-5f)
    throw Error("the state-spaces format cannot hold this model", "norm_eps", "1e-5",
                std::to_string(c.norm_eps));
  if (!c.selective())
    throw Error("the state-spaces format cannot hold this model",
                !c.selective_delta ? "selective_delta"
                : !c.selective_B   ? "selective_B"
                                   : "selective_C",
                "true: no other program has these controls", "false");
  json s;
  s["d_state"] = c.d_state;
  s["d_conv"] = c.d_conv;
  s["expand"] = expand_json(c);
  s["dt_rank"] = c.dt_rank;
  s["dt_min"] = c.dt_min;
  s["dt_max"] = c.dt_max;
  s["dt_init"] = "random";
  s["dt_init_floor"] = c.dt_init_floor;
  s["dt_scale"] = c.dt_scale;
  s["bias"] = c.use_bias;
  s["conv_bias"] = c.use_conv_bias;
  json j;
  j["d_model"] = c.d_model;
  j["n_layer"] = c.n_layer;
  j["d_intermediate"] = 0;
  j["vocab_size"] = c.vocab_size;
  j["pad_vocab_size_multiple"] = c.vocab_size % 8 == 0 ? 8 : 1;
  j["ssm_cfg"] = s;
  j["attn_layer_idx"] = json::array();
  j["attn_cfg"] = json::object();
  j["rms_norm"] = true;
  j["residual_in_fp32"] = c.residual_in_fp32;
  j["fused_add_norm"] = true;
  j["tie_embeddings"] = c.tie_embeddings;
  return j;
}

}  // namespace

Config config_from_json(std::string_view text, const std::string& where) {
  const json object = parse_json(text, where);
  const Fields f{object, where};
  Config c;
  if (f.has("model_type")) {
    f.require(f.text("model_type", "") == "mamba", "model_type", "\"mamba\"");
    c = read_hf(f);
  } else if (f.has("d_model") && f.has("n_layer")) {
    c = read_state_spaces(f);
  } else {
    throw Error("not the configuration of a Mamba model", where,
                "\"model_type\": \"mamba\", or \"d_model\" and \"n_layer\"");
  }
  check_config(c, where);
  return c;
}

Config read_config(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  require_folder(folder, "a model's folder with config.json");
  return config_from_json(MappedFile(path).text(), path.string());
}

std::string config_to_json(const Config& c, Dialect dialect, DType dtype) {
  json j = dialect == Dialect::hf ? hf_json(c, dtype) : state_spaces_json(c);
  if (!c.selective_delta) j["krait_selective_delta"] = false;
  if (!c.selective_B) j["krait_selective_B"] = false;
  if (!c.selective_C) j["krait_selective_C"] = false;
  return j.dump(2) + "\n";
}

}  // namespace krait
