// krait info: what a model's folder holds, from config.json and the headers of the weight files.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "command.h"
#include "formats/tensor_file.h"
#include "model/parameters.h"

namespace krait {
namespace {

// How many elements the weight files store in each type, e.g. {"BF16": 129135360}.
std::map<std::string, int64_t> stored_elements(const TensorFile& file) {
  std::map<std::string, int64_t> by_dtype;
  for (const std::string& name : file.names())
    by_dtype[file.dtype_of(name)] += file.at(name).size();
  return by_dtype;
}

std::string most_common(const std::map<std::string, int64_t>& by_dtype) {
  const auto most = std::max_element(by_dtype.begin(), by_dtype.end(),
                                     [](auto& a, auto& b) { return a.second < b.second; });
  return most == by_dtype.end() ? "" : most->first;
}

std::string with_separators(int64_t number) {
  std::string text = std::to_string(number);
  for (int i = static_cast<int>(text.size()) - 3; i > 0; i -= 3)
    text.insert(static_cast<size_t>(i), 1, ',');
  return text;
}

void row(std::string& out, const std::string& name, const std::string& value) {
  out += name + std::string(name.size() < 26 ? 26 - name.size() : 1, ' ') + value + "\n";
}

std::string for_people(const Config& c, const TensorFile& file, bool has_tokenizer) {
  std::string out;
  row(out, "parameters", with_separators(parameter_count(c)));
  for (const ParameterCount& p : parameter_counts(c))
    row(out, std::string("  ") + p.group, with_separators(p.count));
  row(out, "vocab_size", std::to_string(c.vocab_size));
  row(out, "d_model", std::to_string(c.d_model));
  row(out, "n_layer", std::to_string(c.n_layer));
  row(out, "d_inner", std::to_string(c.d_inner));
  row(out, "d_state", std::to_string(c.d_state));
  row(out, "d_conv", std::to_string(c.d_conv));
  row(out, "dt_rank", std::to_string(c.dt_rank));
  row(out, "tied embeddings", c.tie_embeddings ? "yes" : "no");
  row(out, "state per sequence", with_separators(c.state_bytes_per_sequence()) + " bytes");
  row(out, "weights",
      file.path().filename().string() + ", " + std::to_string(file.size()) + " tensors, " +
          most_common(stored_elements(file)));
  row(out, "tokenizer", has_tokenizer ? "tokenizer.json" : "none (bytes)");
  return out;
}

int run(const std::string& folder, bool json) {
  const Config config = read_config(folder);
  const TensorFile file = TensorFile::open_folder(folder);
  const bool has_tokenizer =
      std::filesystem::exists(std::filesystem::path(folder) / "tokenizer.json");
  if (!json) {
    write_stdout(for_people(config, file, has_tokenizer));
    return 0;
  }
  nlohmann::ordered_json groups;
  for (const ParameterCount& p : parameter_counts(config)) groups[p.group] = p.count;
  print_json({{"parameters", parameter_count(config)},
              {"parameters_by_group", groups},
              {"state_bytes_per_sequence", config.state_bytes_per_sequence()},
              {"config", nlohmann::ordered_json::parse(config_to_json(config, Dialect::hf))},
              {"weights",
               {{"file", file.path().filename().string()},
                {"tensors", file.size()},
                {"elements_by_dtype", stored_elements(file)}}},
              {"tokenizer", has_tokenizer ? "tokenizer.json" : "bytes"}});
  return 0;
}

}  // namespace

void add_info_command(CLI::App& app, CommandList& out) {
  CLI::App* const command =
      app.add_subcommand("info", "Show a model's shape, parameter counts and size of its state");
  const auto folder = std::make_shared<std::string>();
  const auto json = std::make_shared<bool>(false);
  command->add_option("-m,--model", *folder, "Folder with config.json and weights")->required();
  command->add_flag("--json", *json, "Print one JSON object");
  out.push_back({command, [folder, json] { return run(*folder, *json); }});
}

}  // namespace krait
