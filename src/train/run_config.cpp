#include "train/run_config.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <type_traits>

#include "core/error.h"
#include "core/mapped_file.h"
#include "model/config.h"
#include "train/digest.h"
#include "train/toml_text.h"

namespace krait {
namespace {

struct Limits {
  double low = 0, high = 0;
  bool low_open = false;                  // low itself is not allowed
  std::vector<std::string_view> choices;  // of a string; empty: any
};

constexpr double kMaxCount = 1e15;

Limits from(double low, double high = kMaxCount) { return {low, high, false, {}}; }
Limits above(double low, double high) { return {low, high, true, {}}; }
Limits one_of(std::vector<std::string_view> choices) { return {0, 0, false, std::move(choices)}; }

// A key of the run file: where it is, what it means, whether a run that is resumed must keep it.
struct Key {
  const char *section, *name, *meaning;
  bool fixed = true;
  bool in_digest = true;  // of those that are fixed
  std::string full() const { return std::string(section) + "." + name; }
};

// The one list of keys: reading, setting, checking, writing and the digest all go through it.
template <class Config, class Visitor>
void visit_model_keys(Config& c, Visitor&& v) {
  auto& m = c.model;
  v(Key{"model", "init_from", "folder of a model to fine-tune (sizes come from it)", false},
    m.init_from, Limits{});
  v(Key{"model", "size", "preset of d_model and n_layer", false}, m.size,
    one_of({"", "tiny", "small", "130m", "370m", "790m", "1.4b", "2.8b"}));
  v(Key{"model", "d_model", "width; 0: from the preset, else 256"}, m.d_model, from(0, 65536));
  v(Key{"model", "n_layer", "layers; 0: from the preset, else 6"}, m.n_layer, from(0, 4096));
  v(Key{"model", "d_state", "state per channel"}, m.d_state, from(1, 256));
  v(Key{"model", "d_conv", "taps of the convolution"}, m.d_conv, from(2, 4));
  v(Key{"model", "expand", "d_inner = expand x d_model"}, m.expand, from(1, 64));
  v(Key{"model", "d_inner", "0: expand x d_model"}, m.d_inner, from(0, 1 << 20));
  v(Key{"model", "dt_rank", "0: ceil(d_model / 16)"}, m.dt_rank, from(0, 1 << 20));
  v(Key{"model", "vocab_size", "0: the tokenizer's, rounded up to a multiple of 8"}, m.vocab_size,
    from(0, 1 << 24));
  v(Key{"model", "tie_embeddings", "the head shares the embedding's weights"}, m.tie_embeddings,
    Limits{});
  v(Key{"model", "selective_delta", "delta depends on the input"}, m.selective_delta, Limits{});
  v(Key{"model", "selective_B", "B depends on the input"}, m.selective_B, Limits{});
  v(Key{"model", "selective_C", "C depends on the input"}, m.selective_C, Limits{});
}

template <class Config, class Visitor>
void visit_data_keys(Config& c, Visitor&& v) {
  auto& d = c.data;
  v(Key{"data", "train", "files and folders", false}, d.train, Limits{});
  v(Key{"data", "validation", "files and folders; empty: a part of the training text", false},
    d.validation, Limits{});
  v(Key{"data", "validation_fraction", "part of the training text kept for validation"},
    d.validation_fraction, from(0, 0.9));
  v(Key{"data", "tokenizer", "\"bytes\" or the path of a tokenizer.json", false}, d.tokenizer,
    Limits{});
  v(Key{"data", "mode",
        "documents: packed, state starts at zero; stream: rows with the state carried"},
    d.mode, one_of({"documents", "stream"}));
  v(Key{"data", "separator", "splits a file into documents; empty: a file is a document"},
    d.separator, Limits{});
  v(Key{"data", "seq_len", "longest sequence of tokens that gradients flow through"}, d.seq_len,
    from(1, 1 << 24));
  v(Key{"data", "batch_size", "rows: a batch has batch_size x seq_len tokens"}, d.batch_size,
    from(1, 1 << 20));
  v(Key{"data", "shuffle", "a new order in each epoch"}, d.shuffle, Limits{});
  v(Key{"data", "seed", "of the order and of the choice of validation documents"}, d.seed, from(0));
}

template <class Config, class Visitor>
void visit_optim_keys(Config& c, Visitor&& v) {
  auto& o = c.optim;
  v(Key{"optim", "lr", "highest learning rate", false}, o.lr, above(0, 10));
  v(Key{"optim", "min_lr", "learning rate at the end of the cosine", false}, o.min_lr, from(0, 10));
  v(Key{"optim", "warmup_fraction", "part of the run in which the rate rises", false},
    o.warmup_fraction, from(0, 1));
  v(Key{"optim", "warmup_steps", "0: warmup_fraction of the run", false}, o.warmup_steps, from(0));
  v(Key{"optim", "schedule", "cosine or constant (both after the warmup)", false}, o.schedule,
    one_of({"cosine", "constant"}));
  v(Key{"optim", "beta1", "AdamW", false}, o.beta1, from(0, 0.99999));
  v(Key{"optim", "beta2", "AdamW", false}, o.beta2, from(0, 0.9999999));
  v(Key{"optim", "eps", "AdamW", false}, o.eps, above(0, 1));
  v(Key{"optim", "weight_decay", "not on A_log, D, biases and norms", false}, o.weight_decay,
    from(0, 10));
  v(Key{"optim", "clip", "largest norm of the gradient; 0: no clipping", false}, o.clip,
    from(0, 1e9));
  v(Key{"optim", "accumulation", "batches per step", false}, o.accumulation, from(1, 1 << 20));
}

template <class Config, class Visitor>
void visit_train_keys(Config& c, Visitor&& v) {
  auto& t = c.train;
  v(Key{"train", "steps", "0: until `seconds` are over", false}, t.steps, from(0));
  v(Key{"train", "seconds",
        "time limit; 0: none. Alone it also drives the schedule, which then depends on the clock",
        false},
    t.seconds, from(0, 1e9));
  v(Key{"train", "eval_every", "steps between validations; 0: only at the end", false},
    t.eval_every, from(0));
  v(Key{"train", "eval_tokens", "at most so many validation tokens; 0: all", false}, t.eval_tokens,
    from(0));
  v(Key{"train", "save_every", "steps between checkpoints; 0: only at the end", false},
    t.save_every, from(0));
  v(Key{"train", "keep_last", "checkpoints kept", false}, t.keep_last, from(1, 1e6));
  v(Key{"train", "log_every", "steps between lines of metrics.jsonl", false}, t.log_every, from(1));
  v(Key{"train", "seed", "of the initial weights", true, false}, t.seed, from(0));
  v(Key{"train", "device", "where to compute: cpu or cuda", false}, t.device,
    one_of({"cpu", "cuda"}));
  v(Key{"train", "dtype", "of activations and matrix products: f32 or bf16", true, false}, t.dtype,
    one_of({"f32", "bf16"}));
  v(Key{"train", "recompute",
        "what the backward pass computes again, for less memory and the same bits: none, light or "
        "full",
        false},
    t.recompute, one_of({"none", "light", "full"}));
  v(Key{"train", "threads", "0: all cores", false}, t.threads, from(0, 4096));
  v(Key{"train", "sample_prompts", "continued by the model while it trains", false},
    t.sample_prompts, Limits{});
  v(Key{"train", "sample_every", "steps between samples; 0: only at the end", false},
    t.sample_every, from(0));
  v(Key{"train", "sample_tokens", "tokens per sample", false}, t.sample_tokens, from(1, 1 << 20));
}

template <class Config, class Visitor>
void visit_keys(Config& c, Visitor&& v) {
  visit_model_keys(c, v);
  visit_data_keys(c, v);
  visit_optim_keys(c, v);
  visit_train_keys(c, v);
}

std::string describe(const toml::node& node) {
  if (const auto* s = node.as_string()) return toml_text(s->get());
  if (const auto* i = node.as_integer()) return toml_text(i->get());
  if (const auto* f = node.as_floating_point()) return toml_text(f->get());
  if (const auto* b = node.as_boolean()) return toml_text(b->get());
  return node.is_array() ? "an array" : node.is_table() ? "a table" : "a date or time";
}

std::string range_text(const char* kind, const Limits& limits) {
  const auto bound = [](double x) {
    return x == std::floor(x) && std::abs(x) < 1e15 ? std::to_string(static_cast<int64_t>(x))
                                                    : toml_text(x);
  };
  if (limits.high == kMaxCount) return std::string(kind) + " of at least " + bound(limits.low);
  return std::string(kind) + (limits.low_open ? " above " : " from ") + bound(limits.low) +
         (limits.low_open ? ", at most " : " to ") + bound(limits.high);
}

void check_range(double x, const char* kind, const Limits& limits, const std::string& where) {
  const bool inside =
      x <= limits.high && (limits.low_open ? x > limits.low : x >= limits.low);  // NaN: outside
  if (!inside) {
    const bool whole = x == std::floor(x) && std::abs(x) < 1e15;
    throw Error("value out of range", where, range_text(kind, limits),
                whole ? std::to_string(static_cast<int64_t>(x)) : toml_text(x));
  }
}

void read(const toml::node& node, bool& value, const Limits&, const std::string& where) {
  const auto* b = node.as_boolean();
  if (!b) throw Error("wrong type", where, "true or false", describe(node));
  value = b->get();
}

void read(const toml::node& node, int64_t& value, const Limits& limits, const std::string& where) {
  const auto* i = node.as_integer();
  if (!i) throw Error("wrong type", where, range_text("a whole number", limits), describe(node));
  check_range(static_cast<double>(i->get()), "a whole number", limits, where);
  value = i->get();
}

void read(const toml::node& node, double& value, const Limits& limits, const std::string& where) {
  const auto* f = node.as_floating_point();
  const auto* i = node.as_integer();
  if (!f && !i) throw Error("wrong type", where, range_text("a number", limits), describe(node));
  const double x = f ? f->get() : static_cast<double>(i->get());
  check_range(x, "a number", limits, where);
  value = x;
}

void read(const toml::node& node, std::string& value, const Limits& limits,
          const std::string& where) {
  std::string expected = limits.choices.empty() ? "a string" : "one of";
  for (const auto& choice : limits.choices) {
    if (!choice.empty()) expected.append(" ").append(toml_text(choice));
  }
  const auto* s = node.as_string();
  if (!s) throw Error("wrong type", where, expected, describe(node));
  const auto& choices = limits.choices;
  if (!choices.empty() && std::find(choices.begin(), choices.end(), s->get()) == choices.end()) {
    throw Error("unknown value", where, expected, describe(node));
  }
  value = s->get();
}

void read(const toml::node& node, std::vector<std::string>& value, const Limits&,
          const std::string& where) {
  const auto* array = node.as_array();
  if (!array) throw Error("wrong type", where, "a list of strings", describe(node));
  std::vector<std::string> items;
  for (const toml::node& item : *array) {
    const auto* s = item.as_string();
    if (!s) throw Error("wrong type", where, "a list of strings", "a list with " + describe(item));
    items.push_back(s->get());
  }
  value = std::move(items);
}

std::string known_sections() { return "one of the sections [model] [data] [optim] [train]"; }

void check_known(const toml::table& table, const std::string& source) {
  std::map<std::string, std::string> known;  // section -> its keys, as text
  std::set<std::string> full;
  RunConfig defaults;
  visit_keys(defaults, [&](const Key& key, auto&, const Limits&) {
    known[key.section] += std::string(known[key.section].empty() ? "" : ", ") + key.name;
    full.insert(key.full());
  });
  for (const auto& [section_key, node] : table) {
    const std::string section(section_key.str());
    if (!known.count(section))
      throw Error("unknown key \"" + section + "\"", source, known_sections());
    const auto* entries = node.as_table();
    if (!entries) throw Error("wrong type", source + ", " + section, "a section", describe(node));
    for (const auto& [key, value] : *entries) {
      const std::string name = section + "." + std::string(key.str());
      if (!full.count(name))
        throw Error("unknown key \"" + name + "\"", source, "one of " + known[section]);
    }
  }
}

void apply_table(RunConfig& config, const toml::table& table, const std::string& source) {
  check_known(table, source);
  visit_keys(config, [&](const Key& key, auto& value, const Limits& limits) {
    const auto* section = table.get_as<toml::table>(key.section);
    const toml::node* node = section ? section->get(key.name) : nullptr;
    if (node) read(*node, value, limits, source + ", " + key.full());
  });
}

// TOML text of a value given on the command line: strings may come without quotes, a list of one
// without brackets.
template <class T>
std::string command_line_value(const std::string& text) {
  const char first = text.empty() ? ' ' : text.front();
  if constexpr (std::is_same_v<T, std::string>)
    return first == '"' || first == '\'' ? text : toml_text(text);
  if constexpr (std::is_same_v<T, std::vector<std::string>>)
    return first == '[' ? text : std::string("[").append(toml_text(text)).append("]");
  return text;
}

void apply_setting(RunConfig& config, const std::string& setting) {
  const std::string source = "--set " + setting;
  const size_t equals = setting.find('=');
  if (equals == std::string::npos)
    throw Error("no \"=\" in the setting", source, "section.key=value");
  const std::string name = setting.substr(0, equals), text = setting.substr(equals + 1);
  bool found = false;
  visit_keys(config, [&](const Key& key, auto& value, const Limits& limits) {
    if (key.full() != name) return;
    found = true;
    using T = std::decay_t<decltype(value)>;
    toml::table table;
    try {
      table = toml::parse(std::string("value = ").append(command_line_value<T>(text)).append("\n"));
    } catch (const toml::parse_error&) {
      table.clear();
    }
    if (table.size() != 1) {  // not one TOML value: `read` says which type it expects
      table.clear();
      table.insert("value", text);
    }
    read(*table.get("value"), value, limits, source);
  });
  if (!found)
    throw Error("unknown key \"" + name + "\"", source,
                "section.key=value with a key of the run file");
}

void fill_sizes(ModelSettings& m, const std::string& source) {
  struct Preset {
    const char* name;
    int64_t n_layer, d_model;
  };
  static constexpr Preset kPresets[] = {{"tiny", 4, 128},   {"small", 8, 384},  {"130m", 24, 768},
                                        {"370m", 48, 1024}, {"790m", 48, 1536}, {"1.4b", 48, 2048},
                                        {"2.8b", 64, 2560}};
  int64_t n_layer = 6, d_model = 256;
  for (const Preset& preset : kPresets) {
    if (m.size == preset.name) {
      n_layer = preset.n_layer;
      d_model = preset.d_model;
    }
  }
  if (!m.size.empty() && (m.d_model || m.n_layer)) {
    throw Error("model.size and model.d_model or model.n_layer are both given", source,
                "one or the other");
  }
  if (!m.d_model) m.d_model = d_model;
  if (!m.n_layer) m.n_layer = n_layer;
  m.size.clear();
}

// Names of the keys that somebody gave, in the file or on the command line.
using Given = std::set<std::string>;

Given given_keys(const toml::table& table, const std::vector<std::string>& settings) {
  Given given;
  for (const auto& [section, node] : table)
    if (const toml::table* keys = node.as_table())
      for (const auto& [key, value] : *keys)
        given.insert(std::string(section.str()) + "." + std::string(key.str()));
  for (const std::string& setting : settings) given.insert(setting.substr(0, setting.find('=')));
  return given;
}

// The model to fine-tune has its sizes: they take the settings' place, which may not say otherwise.
void take_sizes(ModelSettings& m, const Given& given, const std::string& source) {
  const Config base = read_config(m.init_from);
  const auto take = [&](const char* name, auto& value, auto theirs, bool free) {
    const std::string key = std::string("model.") + name;
    if (given.contains(key) && !free && value != theirs)
      throw Error("not the size of the model to fine-tune", source + ", " + key,
                  toml_text(theirs) + " as in " + m.init_from + ", or no value", toml_text(value));
    value = theirs;
  };
  if (!m.size.empty()) {
    ModelSettings preset;
    preset.size = m.size;
    fill_sizes(preset, source);
    if (preset.d_model != base.d_model || preset.n_layer != base.n_layer)
      throw Error("not the size of the model to fine-tune", source + ", model.size",
                  "no value: it comes from " + m.init_from, m.size);
    m.size.clear();
  }
  take("d_model", m.d_model, base.d_model, m.d_model == 0);
  take("n_layer", m.n_layer, base.n_layer, m.n_layer == 0);
  take("d_state", m.d_state, base.d_state, false);
  take("d_conv", m.d_conv, base.d_conv, false);
  if (base.d_inner % base.d_model == 0)
    take("expand", m.expand, base.d_inner / base.d_model, m.d_inner > 0);
  take("d_inner", m.d_inner, base.d_inner, m.d_inner == 0);
  take("dt_rank", m.dt_rank, base.dt_rank, m.dt_rank == 0);
  take("vocab_size", m.vocab_size, base.vocab_size, m.vocab_size == 0);
  take("tie_embeddings", m.tie_embeddings, base.tie_embeddings, false);
  take("selective_delta", m.selective_delta, base.selective_delta, false);
  take("selective_B", m.selective_B, base.selective_B, false);
  take("selective_C", m.selective_C, base.selective_C, false);
}

void make_absolute(std::string& path) {
  if (!path.empty()) path = std::filesystem::absolute(path).lexically_normal().string();
}

void resolve(RunConfig& c, const Given& given, const std::string& source) {
  make_absolute(c.model.init_from);
  if (!c.model.init_from.empty()) take_sizes(c.model, given, source);
  fill_sizes(c.model, source);
  const std::string own_tokenizer = c.model.init_from + "/tokenizer.json";
  if (!c.model.init_from.empty() && c.data.tokenizer == "bytes" &&
      std::filesystem::exists(own_tokenizer)) {
    c.data.tokenizer = own_tokenizer;
  }
  for (auto& path : c.data.train) make_absolute(path);
  for (auto& path : c.data.validation) make_absolute(path);
  if (c.data.tokenizer != "bytes") make_absolute(c.data.tokenizer);
  if (c.data.train.empty())
    throw Error("no training text", source + ", data.train", "at least one file or folder");
  if (c.train.steps == 0 && c.train.seconds == 0) {
    throw Error("the run has no end", source, "train.steps or train.seconds above 0");
  }
  if (c.optim.min_lr > c.optim.lr) {
    throw Error("value out of range", source + ", optim.min_lr",
                "at most optim.lr = " + toml_text(c.optim.lr), toml_text(c.optim.min_lr));
  }
  if (c.train.steps && c.optim.warmup_steps > c.train.steps) {
    throw Error("value out of range", source + ", optim.warmup_steps",
                "at most train.steps = " + std::to_string(c.train.steps),
                std::to_string(c.optim.warmup_steps));
  }
}

}  // namespace

RunConfig parse_run_config(std::string_view text, const std::string& source,
                           const std::vector<std::string>& settings) {
  RunConfig config;
  const toml::table table = parse_toml(text, source);
  apply_table(config, table, source);
  // A preset on the command line takes the place of sizes in the file, as it did when the file was
  // written.
  if (std::ranges::any_of(settings, [](const auto& s) { return s.starts_with("model.size="); }))
    config.model.d_model = config.model.n_layer = 0;
  for (const std::string& setting : settings) apply_setting(config, setting);
  resolve(config, given_keys(table, settings), source);
  return config;
}

RunConfig load_run_config(const std::filesystem::path& file,
                          const std::vector<std::string>& settings) {
  if (file.empty()) return parse_run_config("", "run settings", settings);
  const MappedFile mapped(file);
  return parse_run_config(mapped.text(), file.string(), settings);
}

std::string write_run_config(const RunConfig& config) {
  std::string text =
      "# Settings of a training run, complete: `krait train --config` with this file repeats it.\n";
  std::string section;
  visit_keys(config, [&](const Key& key, const auto& value, const Limits&) {
    if (section != key.section) {
      section = key.section;
      text.append("\n[").append(section).append("]\n");
    }
    text += std::string(key.name) + " = " + toml_text(value) + "  # " + key.meaning + "\n";
  });
  return text;
}

uint32_t run_config_digest(const RunConfig& config) {
  Crc32c crc;
  visit_keys(config, [&](const Key& key, const auto& value, const Limits&) {
    if (key.fixed && key.in_digest) crc.update(key.full() + "=" + toml_text(value) + "\n");
  });
  return crc.value();
}

void check_resumable(const RunConfig& config, const std::filesystem::path& file) {
  RunConfig run;  // as written: there is nothing to resolve
  apply_table(run, parse_toml(MappedFile(file).text(), file.string()), file.string());
  std::map<std::string, std::string> kept;
  visit_keys(run, [&](const Key& key, const auto& value, const Limits&) {
    if (key.fixed) kept[key.full()] = toml_text(value);
  });
  visit_keys(config, [&](const Key& key, const auto& value, const Limits&) {
    if (key.fixed && kept.at(key.full()) != toml_text(value))
      throw Error(key.full() + " cannot change when a run is resumed", file.string(),
                  kept.at(key.full()) + " as the run has", toml_text(value));
  });
}

}  // namespace krait
