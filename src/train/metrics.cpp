#include "train/metrics.h"

#include <array>
#include <chrono>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/mapped_file.h"

namespace krait {
namespace {

double wall_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// nlohmann writes non-finite numbers as null and doubles so that they read back to the same bits.
std::string line_of(const nlohmann::ordered_json& object) { return object.dump() + "\n"; }

// f(line, its object) for each line that has a step.
template <class F>
void each_line(const std::filesystem::path& path, F&& f) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    const auto object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (object.is_object() && object.contains("step") && object["step"].is_number())
      f(line, object);
  }
}

void keep_until(const std::filesystem::path& path, int64_t last_step) {
  std::string kept;
  if (last_step > 0)
    each_line(path, [&](const std::string& line, const nlohmann::json& object) {
      if (object["step"].get<double>() <= static_cast<double>(last_step)) kept += line + "\n";
    });
  write_file_atomic(path, kept);
}

}  // namespace

std::string to_json(const StepMetrics& m) {
  return line_of({{"step", m.step},
                  {"tokens", m.tokens},
                  {"loss", m.loss},
                  {"lr", m.lr},
                  {"grad_norm", m.grad_norm},
                  {"tokens_per_s", std::round(m.tokens_per_s)},
                  {"elapsed_s", std::round(m.elapsed_s * 1e3) / 1e3}});
}

std::string to_json(const EvalMetrics& m) {
  nlohmann::ordered_json line = {
      {"step", m.step}, {"tokens", m.tokens}, {"val_loss", m.loss}, {"perplexity", m.perplexity}};
  if (m.accuracy) {
    line["accuracy"] = *m.accuracy;
    line["sequence_accuracy"] = m.sequence_accuracy.value_or(0);
  } else {
    line["bits_per_byte"] = m.bits_per_byte;
  }
  line["val_tokens"] = m.scored_tokens;
  line["elapsed_s"] = std::round(m.elapsed_s * 1e3) / 1e3;
  return line_of(line);
}

bool validation_logged(const std::filesystem::path& run_folder, int64_t step) {
  bool found = false;
  each_line(run_folder / "metrics.jsonl", [&](const std::string&, const nlohmann::json& object) {
    found = found || (object["step"] == step && object.contains("val_loss"));
  });
  return found;
}

MetricsWriter::MetricsWriter(const std::filesystem::path& run_folder, int64_t resume_step)
    : tensorboard_(run_folder / "tb", resume_step > 0 ? resume_step + 1 : 0) {
  const auto path = run_folder / "metrics.jsonl";
  keep_until(path, resume_step);
  file_.emplace(path);
}

void MetricsWriter::write(const StepMetrics& m) {
  file_->append(to_json(m));
  const std::array<std::pair<std::string, double>, 4> scalars = {
      {{"train/loss", m.loss},
       {"train/lr", m.lr},
       {"train/grad_norm", m.grad_norm},
       {"train/tokens_per_s", m.tokens_per_s}}};
  tensorboard_.write(wall_time(), m.step, scalars);
}

void MetricsWriter::write(const EvalMetrics& m) {
  file_->append(to_json(m));
  const std::array<std::pair<std::string, double>, 3> scalars = {
      {{"validation/loss", m.loss},
       {"validation/perplexity", m.perplexity},
       m.accuracy ? std::pair<std::string, double>{"validation/accuracy", *m.accuracy}
                  : std::pair<std::string, double>{"validation/bits_per_byte", m.bits_per_byte}}};
  tensorboard_.write(wall_time(), m.step, scalars);
}

}  // namespace krait
