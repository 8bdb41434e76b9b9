#include "train/experiment_results.h"

#include <algorithm>
#include <bit>
#include <cstdio>

#include "formats/json.h"

namespace krait {
namespace {

using Json = nlohmann::ordered_json;

Json score_json(const TaskScore& s) {
  return {{"length", s.length},
          {"sequences", s.sequences},
          {"answers", s.answers},
          {"right_answers", s.right_answers},
          {"right_sequences", s.right_sequences},
          {"token_accuracy", s.token_accuracy()},
          {"sequence_accuracy", s.sequence_accuracy()},
          {"loss", s.loss}};
}

TaskScore score_from_json(const nlohmann::json& j, const std::string& where) {
  TaskScore s;
  s.length = get_int(j, "length", where, 1);
  s.sequences = get_int(j, "sequences", where, 1);
  s.answers = get_int(j, "answers", where, 1);
  s.right_answers = get_int(j, "right_answers", where, 0, s.answers);
  s.right_sequences = get_int(j, "right_sequences", where, 0, s.sequences);
  s.loss = get_number(j, "loss", where);
  return s;
}

Json settings_json(const ExperimentSettings& s) {
  const TaskSettings& t = s.task;
  return {{"vocab_size", t.vocab_size},
          {"length", t.length},
          {"data_tokens", t.task == Task::selective_copying ? Json(t.data_tokens) : Json()},
          {"max_position", t.task == Task::induction_heads ? Json(t.max_position) : Json()},
          {"n_layer", s.n_layer},
          {"d_model", s.d_model},
          {"d_state", s.d_state},
          {"selective", s.selective},
          {"dt_min", s.dt_min},
          {"batch_size", s.batch_size},
          {"growth_steps", s.growth_steps},
          {"lr", s.lr},
          {"clip", s.adam.clip},
          {"betas", {s.adam.beta1, s.adam.beta2}},
          {"steps", s.steps},
          {"dtype", s.dtype},
          {"eval_every", s.eval_every},
          {"eval_sequences", s.eval_sequences},
          {"goal", s.goal},
          {"max_loss", s.max_loss},
          {"test_lengths", s.test_lengths},
          {"min_test_sequences", s.min_test_sequences},
          {"max_test_sequences", s.max_test_sequences},
          {"test_tokens", s.test_tokens}};
}

std::string percent(double share) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", 100 * share);
  std::string s = text;
  // 99.996 is not 100.
  if (share < 1 && s == "100.00") s = "99.99";
  return s == "100.00" ? "100" : s;
}

// 2^10, or 1000.
std::string length_text(int64_t length) {
  const auto bits = static_cast<uint64_t>(length);
  return std::has_single_bit(bits) ? "2^" + std::to_string(std::bit_width(bits) - 1)
                                   : std::to_string(length);
}

std::string minutes(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f min", seconds / 60);
  return text;
}

std::string row(const std::vector<std::string>& cells) {
  std::string line = "|";
  for (const std::string& cell : cells) line += " " + cell + " |";
  return line + "\n";
}

std::string state_of_run(const ExperimentResult& r) {
  if (!r.trained) return std::to_string(r.step) + " (training)";
  return std::to_string(r.step) + (r.tested ? "" : " (testing)");
}

std::string copying_table(const std::vector<ExperimentResult>& results) {
  std::string table = row({"seed", "steps", "training", "token accuracy %", "sequence accuracy %",
                           "answers tested"}) +
                      row({"---", "---", "---", "---", "---", "---"});
  for (const ExperimentResult& r : results) {
    std::vector<std::string> cells = {std::to_string(r.seed), state_of_run(r), minutes(r.train_s)};
    if (r.tests.empty()) {
      const std::string validation = r.last ? percent(r.last->token_accuracy()) : "";
      cells.insert(cells.end(), {validation, "", ""});
    } else {
      const TaskScore& t = r.tests.back();
      cells.insert(cells.end(), {percent(t.token_accuracy()), percent(t.sequence_accuracy()),
                                 std::to_string(t.answers)});
    }
    table += row(cells);
  }
  return table;
}

std::string induction_table(const ExperimentSettings& s,
                            const std::vector<ExperimentResult>& results) {
  std::vector<std::string> head = {"seed", "steps", "training"};
  for (const int64_t length : s.test_lengths) head.push_back(length_text(length));
  std::string table = row(head) + row(std::vector<std::string>(head.size(), "---"));
  for (const ExperimentResult& r : results) {
    std::vector<std::string> cells = {std::to_string(r.seed), state_of_run(r), minutes(r.train_s)};
    for (const TaskScore& t : r.tests) cells.push_back(percent(t.token_accuracy()));
    cells.resize(head.size());
    table += row(cells);
  }
  return table;
}

int64_t reached_count(const ExperimentSettings& s, const std::vector<ExperimentResult>& results) {
  return std::count_if(results.begin(), results.end(),
                       [&](const ExperimentResult& r) { return r.reached(s.goal); });
}

Json result_json(const ExperimentResult& r) {
  Json tests = Json::array();
  for (const TaskScore& t : r.tests) tests.push_back(score_json(t));
  return {{"seed", r.seed},           {"steps", r.step},
          {"train_s", r.train_s},     {"trained", r.trained},
          {"tested", r.tested},       {"validation", r.last ? score_json(*r.last) : Json()},
          {"tests", std::move(tests)}};
}

}  // namespace

bool ExperimentResult::reached(double goal) const {
  return tested && std::all_of(tests.begin(), tests.end(),
                               [goal](const TaskScore& t) { return t.token_accuracy() >= goal; });
}

std::string result_text(const ExperimentResult& result) {
  return result_json(result).dump(1) + "\n";
}

ExperimentResult result_from_file(const std::filesystem::path& path) {
  const nlohmann::json j = parse_json_file(path);
  const std::string where = path.string();
  ExperimentResult r;
  r.seed = static_cast<uint64_t>(get_int(j, "seed", where, 0));
  r.step = get_int(j, "steps", where, 0);
  r.train_s = get_number(j, "train_s", where);
  r.trained = get_bool(j, "trained", where);
  r.tested = get_bool(j, "tested", where);
  if (has_field(j, "validation", where))
    r.last = score_from_json(get_object(j, "validation", where), where + ": validation");
  for (const nlohmann::json& test : get_array(j, "tests", where))
    r.tests.push_back(score_from_json(test, where + ": tests"));
  return r;
}

bool passed(const ExperimentSettings& s, const std::vector<ExperimentResult>& results) {
  const auto seeds = static_cast<int64_t>(results.size());
  return seeds > 0 && 3 * reached_count(s, results) >= 2 * seeds;
}

nlohmann::ordered_json results_json(const ExperimentSettings& settings,
                                    const std::vector<ExperimentResult>& results) {
  Json runs = Json::array();
  for (const ExperimentResult& r : results) runs.push_back(result_json(r));
  const bool complete = std::all_of(results.begin(), results.end(),
                                    [](const ExperimentResult& r) { return r.tested; });
  return {{"experiment", name_of(settings.task.task)},   {"settings", settings_json(settings)},
          {"complete", complete && !results.empty()},    {"passed", passed(settings, results)},
          {"reached", reached_count(settings, results)}, {"runs", std::move(runs)}};
}

std::string results_table(const ExperimentSettings& s,
                          const std::vector<ExperimentResult>& results) {
  const bool copying = s.task.task == Task::selective_copying;
  char text[320];
  std::snprintf(
      text, sizeof text, "%s%s: length %lld, %lld layers of width %lld, batch %lld, lr %g, %s.\n\n",
      copying ? "Selective copying" : "Induction heads",
      s.selective ? "" : " without selection (control)", static_cast<long long>(s.task.length),
      static_cast<long long>(s.n_layer), static_cast<long long>(s.d_model),
      static_cast<long long>(s.batch_size), s.lr, s.dtype.c_str());
  std::string table = text + (copying ? copying_table(results) : induction_table(s, results));
  std::snprintf(text, sizeof text, "\n%s %% at every length tested: %lld of %zu seeds.\n",
                percent(s.goal).c_str(), static_cast<long long>(reached_count(s, results)),
                results.size());
  return table + text;
}

}  // namespace krait
