#include "train/report.h"

#include <toml++/toml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/error.h"
#include "train/report_page.h"

namespace krait {
namespace {

using Json = nlohmann::ordered_json;
using Row = std::vector<std::optional<double>>;

constexpr std::array kStepKeys = {"step", "tokens",    "elapsed_s",   "loss",
                                  "lr",   "grad_norm", "tokens_per_s"};
constexpr std::array kEvalKeys = {"step",       "tokens",        "elapsed_s", "val_loss",
                                  "perplexity", "bits_per_byte", "accuracy",  "sequence_accuracy"};
constexpr size_t kLoss = 3;          // column of both
constexpr size_t kMaxPoints = 4000;  // per curve; the page stays small and quick

struct Run {
  std::string name;
  std::vector<Row> steps, evals;  // columns as in the keys above; empty: not a finite number
  int64_t unreadable_lines = 0;
  std::map<std::string, std::string> config;  // "section.key" -> value
};

std::string escape_html(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

// Other writers put NaN and Infinity, which JSON lacks.
std::string without_nan(std::string line) {
  for (const char* word : {"-Infinity", "Infinity", "NaN"}) {
    for (size_t at; (at = line.find(std::string(": ") + word)) != std::string::npos ||
                    (at = line.find(std::string(":") + word)) != std::string::npos;) {
      const size_t begin = line.find(word, at);
      line.replace(begin, std::char_traits<char>::length(word), "null");
    }
  }
  return line;
}

template <size_t N>
Row row_of(const nlohmann::json& object, const std::array<const char*, N>& keys) {
  Row row;
  for (const char* key : keys) {
    const auto it = object.find(key);
    const bool number =
        it != object.end() && it->is_number() && std::isfinite(it->template get<double>());
    row.push_back(number ? std::optional(it->template get<double>()) : std::nullopt);
  }
  return row;
}

void read_metrics(Run& run, const std::filesystem::path& path) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    if (line.empty()) continue;
    const auto object =
        nlohmann::json::parse(without_nan(line), nullptr, /*allow_exceptions=*/false);
    if (!object.is_object() || !object.contains("step") || !object["step"].is_number()) {
      ++run.unreadable_lines;
    } else if (object.contains("val_loss")) {
      run.evals.push_back(row_of(object, kEvalKeys));
    } else {
      run.steps.push_back(row_of(object, kStepKeys));
    }
  }
}

std::string setting_text(const toml::node& node) {
  if (const auto* s = node.as_string()) return s->get();
  if (const auto* i = node.as_integer()) return std::to_string(i->get());
  if (const auto* b = node.as_boolean()) return b->get() ? "true" : "false";
  if (const auto* f = node.as_floating_point()) {
    char text[32];
    return {text, std::to_chars(text, text + sizeof text, f->get()).ptr};
  }
  std::string items;
  if (const auto* array = node.as_array()) {
    for (const toml::node& item : *array)
      items.append(items.empty() ? "" : ", ").append(setting_text(item));
  }
  return items;
}

void read_config(Run& run, const std::filesystem::path& path) {
  toml::table table;
  try {
    table = toml::parse_file(path.string());
  } catch (const toml::parse_error&) {
    run.config["config.toml"] = "not readable";
    return;
  }
  for (const auto& [section, node] : table) {
    const auto* entries = node.as_table();
    if (!entries) continue;
    for (const auto& [key, value] : *entries) {
      run.config[std::string(section.str()) + "." + std::string(key.str())] = setting_text(value);
    }
  }
}

Run read_run(const std::filesystem::path& folder) {
  if (!std::filesystem::is_directory(folder))
    throw Error("no such run", folder.string(), "a folder made by krait train");
  const auto metrics = folder / "metrics.jsonl", config = folder / "config.toml";
  if (!std::filesystem::exists(metrics) && !std::filesystem::exists(config)) {
    throw Error("not a run", folder.string(), "a folder with metrics.jsonl or config.toml");
  }
  Run run;
  auto name = std::filesystem::absolute(folder).lexically_normal();
  if (name.filename().empty()) name = name.parent_path();
  run.name = name.filename().string();
  read_metrics(run, metrics);
  if (std::filesystem::exists(config)) read_config(run, config);
  return run;
}

// Every k-th row, and the last.
std::vector<Row> thinned(const std::vector<Row>& rows) {
  const size_t k = (rows.size() + kMaxPoints - 1) / kMaxPoints;
  if (k <= 1) return rows;
  std::vector<Row> kept;
  for (size_t i = 0; i < rows.size(); i += k) kept.push_back(rows[i]);
  if ((rows.size() - 1) % k != 0) kept.push_back(rows.back());
  return kept;
}

template <size_t N>
Json columns_of(const std::vector<Row>& all, const std::array<const char*, N>& keys) {
  const std::vector<Row> rows = thinned(all);
  Json columns = Json::object();
  for (size_t i = 0; i < N; ++i) {
    Json column = Json::array();
    for (const Row& row : rows) column.push_back(row[i] ? Json(*row[i]) : Json());
    columns[keys[i]] = std::move(column);
  }
  return columns;
}

std::string data_script(const std::vector<Run>& runs) {
  Json data = Json::array();
  for (const Run& run : runs) {
    data.push_back({{"name", run.name},
                    {"train", columns_of(run.steps, kStepKeys)},
                    {"eval", columns_of(run.evals, kEvalKeys)}});
  }
  const std::string json =
      data.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
  std::string safe;  // inside <script>: no "</script>", no "<!--"
  for (const char c : json) safe += c == '<' ? std::string("\\u003c") : std::string(1, c);
  return "window.runs = " + safe + ";\n";
}

std::string number(const std::optional<double>& x, const char* format) {
  if (!x) return "&ndash;";
  char text[64];
  std::snprintf(text, sizeof text, format, *x);
  return text;
}

std::string grouped(const std::optional<double>& x) {  // 1,234,567
  if (!x) return "&ndash;";
  std::string digits = std::to_string(static_cast<int64_t>(*x));
  for (auto at = static_cast<int64_t>(digits.size()) - 3; at > (digits[0] == '-' ? 1 : 0);
       at -= 3) {
    digits.insert(static_cast<size_t>(at), ",");
  }
  return digits;
}

std::string duration(const std::optional<double>& s) {
  if (!s) return "&ndash;";
  const auto t = static_cast<int64_t>(*s + 0.5);
  char text[64];
  if (t < 60) {
    std::snprintf(text, sizeof text, "%lld s", static_cast<long long>(t));
  } else if (t >= 3600) {
    std::snprintf(text, sizeof text, "%lld h %02lld min", static_cast<long long>(t / 3600),
                  static_cast<long long>(t / 60 % 60));
  } else {
    std::snprintf(text, sizeof text, "%lld min %02lld s", static_cast<long long>(t / 60),
                  static_cast<long long>(t % 60));
  }
  return text;
}

std::optional<double> lowest(const std::vector<Row>& rows, size_t column) {
  std::optional<double> best;
  for (const Row& row : rows) {
    if (row[column] && (!best || *row[column] < *best)) best = row[column];
  }
  return best;
}

// Mean over the last rows: a single step's loss is noisy.
std::optional<double> recent_mean(const std::vector<Row>& rows, size_t column) {
  double sum = 0;
  int count = 0;
  for (size_t i = rows.size() - std::min<size_t>(rows.size(), 20); i < rows.size(); ++i) {
    if (!rows[i][column]) continue;
    sum += *rows[i][column];
    ++count;
  }
  return count ? std::optional(sum / count) : std::nullopt;
}

std::optional<double> last(const std::vector<Row>& rows, size_t column) {
  for (auto row = rows.rbegin(); row != rows.rend(); ++row) {
    if ((*row)[column]) return (*row)[column];
  }
  return std::nullopt;
}

std::string summary_table(const std::vector<Run>& runs) {
  std::string html = "<div class=\"numbers\"><table><thead><tr><th>Run</th>";
  for (const char* head : {"Steps", "Tokens", "Time", "Tokens/s", "Train loss", "Val. loss",
                           "Best val. loss", "Perplexity", "Bits per byte"}) {
    html += std::string("<th>") + head + "</th>";
  }
  html += "</tr></thead><tbody>";
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run& run = runs[i];
    html += "<tr><th><i class=\"swatch\" style=\"background:var(--c" + std::to_string(i % 8) +
            ")\"></i>" + escape_html(run.name);
    if (run.steps.empty() && run.evals.empty()) html += " <small>no metrics yet</small>";
    if (run.unreadable_lines)
      html += " <small>" + std::to_string(run.unreadable_lines) + " unreadable line(s)</small>";
    html += "</th>";
    for (const std::string& cell :
         {grouped(last(run.steps, 0)), grouped(last(run.steps, 1)), duration(last(run.steps, 2)),
          grouped(recent_mean(run.steps, 6)), number(recent_mean(run.steps, 3), "%.4f"),
          number(last(run.evals, 3), "%.4f"), number(lowest(run.evals, 3), "%.4f"),
          number(last(run.evals, 4), "%.3f"), number(last(run.evals, 5), "%.4f")}) {
      html += "<td>" + cell + "</td>";
    }
    html += "</tr>";
  }
  return html + "</tbody></table></div>";
}

std::string config_table(const std::vector<Run>& runs) {
  std::vector<std::string> keys;  // in the order of the sections, then by name
  for (const char* section : {"model.", "data.", "optim.", "train."}) {
    std::map<std::string, bool> found;
    for (const Run& run : runs) {
      for (const auto& [key, value] : run.config) {
        if (key.rfind(section, 0) == 0) found[key] = true;
      }
    }
    for (const auto& [key, unused] : found) keys.push_back(key);
  }
  if (keys.empty()) return "<p class=\"quiet\">No config.toml.</p>";
  std::string html = "<table class=\"settings\"><thead><tr><th>Key</th>";
  for (const Run& run : runs) html += "<th>" + escape_html(run.name) + "</th>";
  html += "</tr></thead><tbody>";
  for (const std::string& key : keys) {
    std::string cells;
    bool differs = false;
    std::optional<std::string> first;
    for (const Run& run : runs) {
      const auto it = run.config.find(key);
      const std::string value = it == run.config.end() ? "" : it->second;
      differs = differs || (first && *first != value);
      if (!first) first = value;
      cells += "<td>" + escape_html(value) + "</td>";
    }
    html += std::string("<tr") + (differs ? " class=\"differs\"" : "") + "><th>" +
            escape_html(key) + "</th>" + cells + "</tr>";
  }
  return html + "</tbody></table>";
}

}  // namespace

std::string report_html(const std::vector<std::filesystem::path>& run_folders) {
  std::vector<Run> runs;
  for (const auto& folder : run_folders) runs.push_back(read_run(folder));
  if (runs.empty()) throw Error("no run given", "report", "at least one run folder");
  std::string title;
  for (const Run& run : runs) title += (title.empty() ? "" : ", ") + run.name;
  title = escape_html(title);
  return "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
         "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>" +
         title + " - krait</title>\n<style>" + kReportStyle +
         "</style></head>\n<body><header><h1>" + title +
         "</h1><span class=\"quiet\">krait training report</span></header>\n<main>\n" +
         summary_table(runs) +
         "\n<noscript><p>The curves need JavaScript.</p></noscript>\n<div "
         "id=\"controls\"></div><div id=\"charts\"></div>\n"
         "<details" +
         (runs.size() > 1 ? " open" : "") + "><summary>Settings</summary>" + config_table(runs) +
         "</details>\n</main>\n<script>\n" + data_script(runs) + kReportScript +
         "</script>\n</body></html>\n";
}

void check_metrics(const std::vector<std::filesystem::path>& run_folders) {
  const auto has_loss = [](const Row& row) { return row[kLoss].has_value(); };
  std::string files;
  for (const auto& folder : run_folders) {
    const Run run = read_run(folder);
    if (std::ranges::any_of(run.steps, has_loss) || std::ranges::any_of(run.evals, has_loss))
      return;
    files += (files.empty() ? "" : ", ") + (folder / "metrics.jsonl").string();
  }
  throw Error("no metrics to report", files, "a line with \"step\" and \"loss\" or \"val_loss\"");
}

}  // namespace krait
