#include <algorithm>

#include "core/error.h"
#include "core/mapped_file.h"
#include "train/checkpoint.h"
#include "train/experiment.h"
#include "train/toml_text.h"

namespace krait {
namespace {

// As this file writes it.
std::string text_of(const toml::node& node) {
  if (const auto* i = node.as_integer()) return toml_text(i->get());
  if (const auto* f = node.as_floating_point()) return toml_text(f->get());
  if (const auto* b = node.as_boolean()) return toml_text(b->get());
  if (const auto* s = node.as_string()) return toml_text(s->get());
  std::vector<int64_t> list;
  if (const auto* array = node.as_array())
    for (const toml::node& item : *array) list.push_back(item.value_or(int64_t{0}));
  return toml_text(list);
}

enum class Resume { same, may_grow, free };  // what a resumed run may change

// A line of config.toml.
struct Setting {
  const char *section, *key;
  std::string value;
  const char* option;  // of krait experiment, where there is one
  Resume resume = Resume::same;
};

// The one list: writing and comparing go through it.
std::vector<Setting> settings_list(const ExperimentSettings& s) {
  const TaskSettings& t = s.task;
  const bool copying = t.task == Task::selective_copying;
  const char *const model = "model", *const data = "data", *const optim = "optim",
                    *const train = "train";
  return {
      {model, "d_model", toml_text(s.d_model), "--d-model"},
      {model, "n_layer", toml_text(s.n_layer), "--n-layer"},
      {model, "d_state", toml_text(s.d_state), "--d-state"},
      {model, "dt_min", toml_text(s.dt_min), "--dt-min"},
      {model, "dt_max", toml_text(s.dt_max), "dt_max"},
      {model, "selective", toml_text(s.selective), "--no-selection"},
      {data, "experiment", toml_text(std::string(name_of(t.task))), "the task"},
      {data, "vocab_size", toml_text(t.vocab_size), "vocab_size"},
      {data, "length", toml_text(t.length), "--length"},
      copying ? Setting{data, "data_tokens", toml_text(t.data_tokens), "--data-tokens"}
              : Setting{data, "max_position", toml_text(t.max_position), "--max-position"},
      {data, "batch_size", toml_text(s.batch_size), "--batch"},
      {data, "growth_steps", toml_text(s.growth_steps), "--growth-steps"},
      {optim, "lr", toml_text(s.lr), "--lr"},
      {optim, "decay_fraction", toml_text(s.decay_fraction), "decay_fraction"},
      {optim, "beta1", toml_text(s.adam.beta1), "beta1"},
      {optim, "beta2", toml_text(s.adam.beta2), "--beta2"},
      {optim, "eps", toml_text(s.adam.eps), "eps"},
      {optim, "weight_decay", toml_text(s.adam.weight_decay), "weight_decay"},
      {optim, "clip", toml_text(s.adam.clip), "--clip"},
      {train, "steps", toml_text(s.steps), "--steps", Resume::may_grow},
      {train, "seed", toml_text(static_cast<int64_t>(s.seed)), "seed"},
      {train, "dtype", toml_text(s.dtype), "--dtype"},
      {train, "eval_every", toml_text(s.eval_every), "--eval-every"},
      {train, "eval_sequences", toml_text(s.eval_sequences), "--eval-sequences"},
      {train, "goal", toml_text(s.goal), "--goal", Resume::free},
      {train, "max_loss", toml_text(s.max_loss), "--max-loss", Resume::free},
      {train, "test_lengths", toml_text(s.test_lengths), "--max-test-length"},
      {train, "max_test_sequences", toml_text(s.max_test_sequences), "--test-sequences"},
      {train, "min_test_sequences", toml_text(s.min_test_sequences), "--test-sequences"},
      {train, "test_tokens", toml_text(s.test_tokens), "test_tokens"},
  };
}

void require(bool good, const char* name, const std::string& expected, int64_t got) {
  if (!good) throw Error("out of range", name, expected, std::to_string(got));
}

}  // namespace

ExperimentSettings paper_settings(Task task) {
  ExperimentSettings s;
  s.task.task = task;
  s.adam = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0, .clip = 1.0};
  if (task == Task::selective_copying) {
    s.task.length = 4096;
    s.batch_size = 64;
    s.lr = 1e-4;
    s.steps = 400000;
    s.log_every = 20;
    s.eval_every = 1000;
    s.save_every = 10000;
    s.eval_sequences = 64;
    s.goal = 0.995;
    s.max_loss = 1;
    s.test_lengths = {4096};
    s.max_test_sequences = 1024;
  } else {
    for (int64_t length = 64; length <= int64_t{1} << 20; length *= 2)
      s.test_lengths.push_back(length);
  }
  return s;
}

void check_settings(const ExperimentSettings& s) {
  const TaskSettings& t = s.task;
  constexpr int64_t kMaxWidth = 4096, kMaxLength = int64_t{1} << 26;
  require(t.vocab_size >= 4 && t.vocab_size <= 65536, "vocabulary", "4 to 65536", t.vocab_size);
  require(t.length >= 8 && t.length <= kMaxLength, "--length", "8 to 2^26", t.length);
  require(t.data_tokens >= 1 && t.data_tokens <= 4096, "--data-tokens", "1 to 4096", t.data_tokens);
  // Shorter sequences than the setting allows have it among their own first tokens.
  require(t.max_position >= 1 && t.max_position <= std::max<int64_t>(10, t.length - 2),
          "--max-position", "1 to --length - 2", t.max_position);
  require(s.d_model >= 1 && s.d_model <= kMaxWidth, "--d-model", "1 to 4096", s.d_model);
  require(s.n_layer >= 1 && s.n_layer <= 256, "--n-layer", "1 to 256", s.n_layer);
  require(s.d_state >= 1 && s.d_state <= 256, "--d-state", "1 to 256", s.d_state);
  require(s.batch_size >= 1 && s.batch_size <= 1 << 18, "--batch", "1 to 2^18", s.batch_size);
  require(s.batch_size * t.tokens_of(t.length) < int64_t{1} << 31, "--batch x --length",
          "below 2^31", s.batch_size * t.tokens_of(t.length));
  require(s.steps >= 1 && s.steps < int64_t{1} << 33, "--steps", "1 to 2^33 - 1", s.steps);
  require(s.log_every >= 1, "steps between lines of metrics.jsonl", "at least 1", s.log_every);
  require(s.eval_every >= 1, "--eval-every", "at least 1", s.eval_every);
  require(s.save_every >= 1, "--save-every", "at least 1", s.save_every);
  require(s.growth_steps >= 0, "--growth-steps", "at least 0", s.growth_steps);
  require(s.eval_sequences >= 1 && s.eval_sequences < 1 << 20, "--eval-sequences", "1 to 2^20 - 1",
          s.eval_sequences);
  if (s.test_lengths.empty())
    throw Error("out of range", "--max-test-length", "at least the shortest test, 64");
  for (const int64_t length : s.test_lengths)
    require(length >= 8 && length <= kMaxLength, "--max-test-length", "8 to 2^26", length);
  require(s.min_test_sequences >= 1 && s.max_test_sequences >= s.min_test_sequences &&
              s.max_test_sequences < 1 << 20,
          "--test-sequences", "1 to 2^20 - 1", s.max_test_sequences);
  if (!(s.lr > 0 && s.lr <= 1)) throw Error("out of range", "--lr", "above 0, at most 1");
  if (!(s.goal > 0 && s.goal <= 1)) throw Error("out of range", "--goal", "above 0, at most 1");
  if (!(s.max_loss > 0)) throw Error("out of range", "--max-loss", "above 0");
  if (!(s.adam.clip >= 0)) throw Error("out of range", "--clip", "at least 0");
  if (!(s.adam.beta2 >= 0 && s.adam.beta2 < 1))
    throw Error("out of range", "--beta2", "at least 0, below 1");
  if (!(s.dt_min > 0 && s.dt_min < 0.1))
    throw Error("out of range", "--dt-min", "above 0, below 0.1");
  if (s.dtype != "f32" && s.dtype != "bf16")
    throw Error("no such type", "--dtype", "f32 or bf16", s.dtype);
}

void check_resumable(const ExperimentSettings& settings, const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / "config.toml";
  if (list_checkpoints(folder).empty() || !std::filesystem::exists(file)) return;
  const toml::table run = parse_toml(MappedFile(file).text(), file.string());
  for (const Setting& s : settings_list(settings)) {
    const toml::node* const node = run[s.section][s.key].node();
    if (!node || s.resume == Resume::free) continue;  // not written by earlier versions
    const std::string has = text_of(*node), of_run = std::string(s.key) + " = " + has;
    if (s.resume == Resume::may_grow) {
      if (settings.steps < node->value_or(int64_t{0}))
        throw Error(std::string(s.option) + " cannot become less at --resume", file.string(),
                    "at least " + of_run + " as the run has", s.value);
    } else if (has != s.value) {
      throw Error(std::string(s.option) + " cannot change at --resume", file.string(),
                  of_run + " as the run has", s.value);
    }
  }
}

std::string settings_toml(const ExperimentSettings& s) {
  std::string out, section;
  for (const Setting& setting : settings_list(s)) {
    if (section != setting.section) {
      section = setting.section;
      out += (out.empty() ? "[" : "\n[") + section + "]\n";
    }
    out += std::string(setting.key) + " = " + setting.value + "\n";
  }
  return out;
}

}  // namespace krait
