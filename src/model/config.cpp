#include "model/config.h"

#include <array>
#include <utility>

#include "core/error.h"

namespace krait {
namespace {

struct Range {
  const char* name;
  int64_t Config::*member;
  int64_t min, max;
};

// What the ops can do (d_state, d_conv), and sizes beyond which a number is rather a mistake than a
// model.
constexpr std::array<Range, 7> kRanges{{
    {"vocab_size", &Config::vocab_size, 1, int64_t{1} << 24},
    {"d_model", &Config::d_model, 1, int64_t{1} << 16},
    {"n_layer", &Config::n_layer, 1, 4096},
    {"d_inner", &Config::d_inner, 1, int64_t{1} << 18},
    {"d_state", &Config::d_state, 1, 256},
    {"d_conv", &Config::d_conv, 2, 4},
    {"dt_rank", &Config::dt_rank, 1, int64_t{1} << 16},
}};

void require(bool ok, const char* name, double value, const char* expected,
             const std::string& where) {
  if (!ok) throw Error("value out of range", where + ": " + name, expected, std::to_string(value));
}

void check_token(std::optional<int32_t> token, const char* name, const Config& c,
                 const std::string& where) {
  if (token && (*token < 0 || *token >= c.vocab_size))
    throw Error("token outside the vocabulary", where + ": " + name,
                "0 to " + std::to_string(c.vocab_size - 1), std::to_string(*token));
}

}  // namespace

Dialect dialect_from_name(const std::string& name) {
  if (name == "hf") return Dialect::hf;
  if (name == "state-spaces") return Dialect::state_spaces;
  throw Error("unknown format of model folders", "", "hf or state-spaces", "\"" + name + "\"");
}

int64_t Config::state_bytes_per_sequence(DType dtype) const {
  return n_layer * ((d_conv - 1) * d_inner + d_inner * d_state) *
         static_cast<int64_t>(size_of(dtype));
}

Config make_config(int64_t vocab_size, int64_t d_model, int64_t n_layer) {
  Config c;
  c.vocab_size = vocab_size;
  c.d_model = d_model;
  c.n_layer = n_layer;
  c.d_inner = 2 * d_model;
  c.dt_rank = (d_model + 15) / 16;
  return c;
}

Config preset(const std::string& name) {
  struct Size {
    const char* name;
    int64_t d_model, n_layer;
  };
  constexpr Size kSizes[] = {{"130m", 768, 24},
                             {"370m", 1024, 48},
                             {"790m", 1536, 48},
                             {"1.4b", 2048, 48},
                             {"2.8b", 2560, 64}};
  for (const Size& size : kSizes) {
    if (name != size.name) continue;
    Config c = make_config(50280, size.d_model, size.n_layer);
    c.bos_token_id = c.pad_token_id = 0;
    c.eos_token_ids = {0};
    return c;
  }
  throw Error("unknown model size", "", "130m, 370m, 790m, 1.4b or 2.8b", "\"" + name + "\"");
}

void check_config(const Config& c, const std::string& where) {
  for (const Range& r : kRanges)
    if (c.*r.member < r.min || c.*r.member > r.max)
      throw Error("size out of range", where + ": " + r.name,
                  std::to_string(r.min) + " to " + std::to_string(r.max),
                  std::to_string(c.*r.member));
  require(c.norm_eps > 0 && c.norm_eps < 1, "norm_eps", c.norm_eps, "above 0, below 1", where);
  require(c.dt_min > 0, "dt_min", c.dt_min, "above 0", where);
  require(c.dt_max >= c.dt_min && c.dt_max < 1e4, "dt_max", c.dt_max, "dt_min to 10000", where);
  require(c.dt_init_floor > 0 && c.dt_init_floor < 1e4, "dt_init_floor", c.dt_init_floor,
          "above 0, below 10000", where);
  require(c.dt_scale > 0 && c.dt_scale < 1e4, "dt_scale", c.dt_scale, "above 0, below 10000",
          where);
  require(c.initializer_range >= 0 && c.initializer_range < 1e4, "initializer_range",
          c.initializer_range, "0 to 10000", where);
  check_token(c.bos_token_id, "bos_token_id", c, where);
  check_token(c.pad_token_id, "pad_token_id", c, where);
  for (int32_t token : c.eos_token_ids) check_token(token, "eos_token_id", c, where);
}

}  // namespace krait
