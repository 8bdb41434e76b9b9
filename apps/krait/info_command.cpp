// krait info: what a model's folder holds, from config.json and the headers of the weight files.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "command.h"
#include "formats/tensor_file.h"
#include "model/parameters.h"
#include "model/weights.h"
#include "ops/cuda_engine.h"
#include "ops/device.h"

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

int run_model(const std::string& folder, bool json) {
  const Config config = read_config(folder);
  const TensorFile file = TensorFile::open_folder(folder);
  check_tensors(config, file);
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

nlohmann::ordered_json to_json(const GpuInfo& gpu) {
  nlohmann::ordered_json json = {
      {"index", gpu.index},
      {"name", gpu.name},
      {"compute_capability", std::to_string(gpu.major) + "." + std::to_string(gpu.minor)},
      {"multiprocessors", gpu.multiprocessors},
      {"total_bytes", gpu.total_bytes},
      {"free_bytes", gpu.free_bytes},
      {"usable", gpu.problem.empty()}};
  if (!gpu.problem.empty()) json["problem"] = gpu.problem;
  return json;
}

std::string for_people(const GpuInfo& gpu) {
  const auto gib = [](int64_t bytes) { return static_cast<double>(bytes) / (1 << 30); };
  char text[160];
  std::snprintf(text, sizeof text,
                ", compute capability %d.%d, %d multiprocessors, %.1f GiB (%.1f free), ", gpu.major,
                gpu.minor, gpu.multiprocessors, gib(gpu.total_bytes), gib(gpu.free_bytes));
  return gpu.name + text + (gpu.problem.empty() ? "usable" : "not usable: " + gpu.problem);
}

int run_devices(bool json) {
  const CpuInfo cpu = cpu_info();
  std::vector<GpuInfo> gpus;
  std::string problem;  // with all of them
  try {
    gpus = list_gpus();
    if (gpus.empty()) problem = "no GPU";
  } catch (const Error& e) {
    problem = e.what();
  }
  if (json) {
    auto list = nlohmann::ordered_json::array();
    for (const GpuInfo& gpu : gpus) list.push_back(to_json(gpu));
    nlohmann::ordered_json cuda = {{"gpus", list}};
    if (!problem.empty()) cuda["problem"] = problem;
    print_json(
        {{"cpu", {{"name", cpu.name}, {"cores", cpu.cores}, {"simd", cpu.simd}}}, {"cuda", cuda}});
    return 0;
  }
  std::string out;
  row(out, "cpu", cpu.name + ", " + std::to_string(cpu.cores) + " cores, " + cpu.simd);
  for (const GpuInfo& gpu : gpus) row(out, "cuda " + std::to_string(gpu.index), for_people(gpu));
  if (!problem.empty()) row(out, "cuda", problem);
  write_stdout(out);
  return 0;
}

struct InfoFlags {
  std::string folder;
  bool devices = false, json = false;
};

int run(const InfoFlags& flags) {
  if (flags.devices == !flags.folder.empty())
    throw UsageError("info needs --model or --devices, one of them");
  return flags.devices ? run_devices(flags.json) : run_model(flags.folder, flags.json);
}

}  // namespace

void add_info_command(CLI::App& app, CommandList& out) {
  CLI::App* const command = app.add_subcommand(
      "info", "Show a model's shape, parameter counts and size of its state, or what can compute");
  const auto flags = std::make_shared<InfoFlags>();
  command->add_option("-m,--model", flags->folder, "Folder with config.json and weights");
  command->add_flag("--devices", flags->devices, "Show the CPU and the GPUs of this machine");
  command->add_flag("--json", flags->json, "Print one JSON object");
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace krait
