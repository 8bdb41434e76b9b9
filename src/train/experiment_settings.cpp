#include <algorithm>
#include <charconv>

#include "core/error.h"
#include "train/experiment.h"

namespace krait {
namespace {

std::string text_of(double x) {
  char text[32];
  const std::string s(text, std::to_chars(text, text + sizeof text, x).ptr);
  return s.find_first_of(".e") == std::string::npos ? s + ".0" : s;
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

std::string settings_toml(const ExperimentSettings& s) {
  const TaskSettings& t = s.task;
  std::string out;
  const auto section = [&](const char* name) {
    out += (out.empty() ? "[" : "\n[") + std::string(name) + "]\n";
  };
  const auto value = [&](const char* key, const std::string& text) {
    out += std::string(key) + " = " + text + "\n";
  };
  const auto whole = [&](const char* key, int64_t x) { value(key, std::to_string(x)); };
  const auto real = [&](const char* key, double x) { value(key, text_of(x)); };
  section("model");
  whole("d_model", s.d_model);
  whole("n_layer", s.n_layer);
  whole("d_state", s.d_state);
  real("dt_min", s.dt_min);
  real("dt_max", s.dt_max);
  value("selective", s.selective ? "true" : "false");
  section("data");
  value("experiment", '"' + std::string(name_of(t.task)) + '"');
  whole("vocab_size", t.vocab_size);
  whole("length", t.length);
  if (t.task == Task::selective_copying)
    whole("data_tokens", t.data_tokens);
  else
    whole("max_position", t.max_position);
  whole("batch_size", s.batch_size);
  whole("growth_steps", s.growth_steps);
  section("optim");
  real("lr", s.lr);
  real("decay_fraction", s.decay_fraction);
  real("beta1", s.adam.beta1);
  real("beta2", s.adam.beta2);
  real("eps", s.adam.eps);
  real("weight_decay", s.adam.weight_decay);
  real("clip", s.adam.clip);
  section("train");
  whole("steps", s.steps);
  whole("seed", static_cast<int64_t>(s.seed));
  value("dtype", '"' + s.dtype + '"');
  whole("eval_every", s.eval_every);
  whole("eval_sequences", s.eval_sequences);
  real("goal", s.goal);
  real("max_loss", s.max_loss);
  return out;
}

}  // namespace krait
