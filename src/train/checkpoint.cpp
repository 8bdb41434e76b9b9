#include "train/checkpoint.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "core/mapped_file.h"
#include "formats/json.h"
#include "formats/safetensors.h"
#include "train/digest.h"
#include "train/host_copy.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

constexpr const char* kStateFile = "trainer_state.json";
constexpr const char* kPrefix = "step-";
constexpr const char* kTemporary = ".tmp-";  // step-N.tmp-PID

uint32_t crc_of(const MappedFile& file) {
  Crc32c crc;
  crc.update(file.data(), file.size());
  return crc.value();
}

// All numbers of a checkpoint where the host reaches them.
struct HostCopies {
  HostCopies(const TrainableModel& model, const Moments& moments, const DecodeState* stream_state)
      : masters(model.config(), model.masters()),
        m(model.config(), moments.m),
        v(model.config(), moments.v) {
    if (!stream_state) return;
    state.emplace(model.config(), stream_state->slots());
    for (int64_t slot = 0; slot < state->slots(); ++slot)
      state->restore(slot, stream_state->save(slot));
  }

  void write_back(TrainableModel& model, Moments& moments, DecodeState* stream_state) const {
    masters.write_back(model.masters());
    m.write_back(moments.m);
    v.write_back(moments.v);
    for (int64_t slot = 0; state && slot < state->slots(); ++slot)
      stream_state->restore(slot, state->save(slot));
  }

  HostCopy masters, m, v;
  std::optional<DecodeState> state;
};

// Moments under the names of their parameters; "state.N.conv" and "state.N.ssm" are the rows'
// states in stream mode.
std::vector<NamedTensor> optimizer_tensors(const Config& config, const HostCopies& copies) {
  std::vector<NamedTensor> tensors;
  for (const ParameterInfo& info : parameter_table(config)) {
    tensors.push_back({"m." + info.name, info.of(copies.m.parameters())});
    tensors.push_back({"v." + info.name, info.of(copies.v.parameters())});
  }
  const DecodeState* const state = copies.state ? &*copies.state : nullptr;
  for (int64_t layer = 0; state && layer < config.n_layer; ++layer) {
    tensors.push_back({"state." + std::to_string(layer) + ".conv", state->conv(layer)});
    tensors.push_back({"state." + std::to_string(layer) + ".ssm", state->ssm(layer)});
  }
  return tensors;
}

nlohmann::json state_to_json(const TrainerState& s) {
  return {{"format", 1},
          {"step", s.step},
          {"tokens", s.tokens},
          {"cursor",
           {{"epoch", s.cursor.epoch}, {"piece", s.cursor.piece}, {"offset", s.cursor.offset}}},
          {"elapsed_s", s.elapsed_s},
          {"config_digest", s.config_digest},
          {"text_digest", s.text_digest}};
}

TrainerState state_from_json(const nlohmann::json& j, const std::string& where) {
  get_int(j, "format", where, 1, 1);
  TrainerState s;
  s.step = get_int(j, "step", where, 0);
  s.tokens = get_int(j, "tokens", where, 0);
  const nlohmann::json& cursor = get_object(j, "cursor", where);
  s.cursor.epoch = get_int(cursor, "epoch", where + ": cursor", 0);
  s.cursor.piece = get_int(cursor, "piece", where + ": cursor", 0);
  s.cursor.offset = get_int(cursor, "offset", where + ": cursor", 0);
  s.elapsed_s = get_number(j, "elapsed_s", where);
  s.config_digest = static_cast<uint32_t>(get_int(j, "config_digest", where, 0, UINT32_MAX));
  s.text_digest = static_cast<uint32_t>(get_int(j, "text_digest", where, 0, UINT32_MAX));
  return s;
}

// The digest of the state file itself: of its JSON without the member "digest". Keys are sorted, so
// the text is unique.
uint32_t own_digest(nlohmann::json j) {
  j.erase("digest");
  return crc32c(j.dump());
}

void write_state(const fs::path& folder, const TrainerState& state) {
  nlohmann::json j = state_to_json(state);
  for (const auto& entry : fs::directory_iterator(folder)) {
    const MappedFile file(entry.path());
    j["files"][entry.path().filename().string()] = {{"bytes", file.size()},
                                                    {"crc32c", crc_of(file)}};
  }
  j["digest"] = own_digest(j);
  write_file_atomic(folder / kStateFile, j.dump(1) + "\n");
}

void check_file(const fs::path& path, const nlohmann::json& entry, const std::string& where) {
  const MappedFile file(path);
  const auto bytes = static_cast<uint64_t>(get_int(entry, "bytes", where, 0));
  if (file.size() != bytes) {
    throw Error("damaged checkpoint: wrong length", path.string(), std::to_string(bytes) + " bytes",
                std::to_string(file.size()));
  }
  if (crc_of(file) != static_cast<uint64_t>(get_int(entry, "crc32c", where, 0, UINT32_MAX))) {
    throw Error("damaged checkpoint: the contents have changed", path.string());
  }
}

// Copies every named tensor of the file to its place. All must be there, f32 and of the right
// shape.
void read_tensors(const fs::path& path, const std::vector<NamedTensor>& places) {
  const MappedFile file(path);
  const TensorTable table = read_safetensors({file.data(), file.size()}, path.string());
  std::map<std::string, const TensorEntry*> by_name;
  for (const TensorEntry& entry : table.entries) by_name[entry.name] = &entry;
  for (const auto& [name, place] : places) {
    const auto it = by_name.find(name);
    if (it == by_name.end()) throw Error("missing tensor", path.string() + ": " + name);
    const Tensor& found = it->second->tensor;
    const bool same = found && found.dtype == DType::f32 && found.size() == place.size();
    if (!same) {
      throw Error("wrong tensor", path.string() + ": " + name, shape_string(place),
                  found ? shape_string(found) : it->second->problem);
    }
    std::memcpy(place.data, found.data, place.bytes());
  }
}

// N of a folder named step-N; -1: another name.
int64_t step_of(const std::string& name) {
  if (name.rfind(kPrefix, 0) != 0) return -1;
  const std::string digits = name.substr(std::strlen(kPrefix));
  const bool number = !digits.empty() && digits.size() <= 18 &&
                      digits.find_first_not_of("0123456789") == std::string::npos;
  return number ? std::stoll(digits) : -1;
}

void write_contents(const fs::path& folder, const TrainerState& state, const Config& config,
                    const HostCopies& copies, const fs::path& tokenizer) {
  save_model(folder, config, copies.masters.parameters(), Dialect::hf, DType::f32);
  if (!tokenizer.empty()) {
    write_file_atomic(folder / "tokenizer.json", MappedFile(tokenizer).text());
    // Without it transformers takes the tokenizer class of Mamba's published models, whatever
    // tokenizer.json says.
    write_file_atomic(folder / "tokenizer_config.json",
                      "{\"tokenizer_class\": \"PreTrainedTokenizerFast\"}\n");
  }
  write_safetensors(folder / "optimizer.safetensors", optimizer_tensors(config, copies));
  write_state(folder, state);
  sync_directory(folder);
}

}  // namespace

std::filesystem::path save_checkpoint(const fs::path& run_folder, const TrainerState& state,
                                      const TrainableModel& model, const Moments& moments,
                                      const DecodeState* stream_state, const fs::path& tokenizer) {
  const fs::path folder = run_folder / (kPrefix + std::to_string(state.step));
  const fs::path temporary = folder.string() + kTemporary + std::to_string(::getpid());
  std::error_code ignored;
  try {
    fs::remove_all(temporary);
    fs::create_directories(temporary);
    write_contents(temporary, state, model.config(), HostCopies(model, moments, stream_state),
                   tokenizer);
    abandon_checkpoints(run_folder,
                        state.step - 1);  // a folder of this name cannot be replaced by a rename
    fs::rename(temporary, folder);
    sync_directory(run_folder);
  } catch (const fs::filesystem_error& e) {
    fs::remove_all(temporary, ignored);
    throw Error("cannot save the checkpoint: " + e.code().message(), folder.string());
  } catch (...) {
    fs::remove_all(temporary, ignored);
    throw;
  }
  return folder;
}

Checkpoint open_checkpoint(const fs::path& folder) {
  const fs::path path = folder / kStateFile;
  const nlohmann::json j = parse_json_file(path);
  if (own_digest(j) != static_cast<uint64_t>(get_int(j, "digest", path.string(), 0, UINT32_MAX))) {
    throw Error("damaged checkpoint: the contents have changed", path.string());
  }
  const nlohmann::json& files = get_object(j, "files", path.string());
  for (const char* needed : {"config.json", "model.safetensors", "optimizer.safetensors"}) {
    get_object(files, needed, path.string() + ": files");
  }
  for (const auto& [name, entry] : files.items()) {
    if (name.find('/') != std::string::npos)
      throw Error("not a file name", path.string() + ": files", "", in_quotes(name));
    check_file(folder / name, entry, path.string() + ": files: " + name);
  }
  return {folder, state_from_json(j, path.string())};
}

std::vector<int64_t> list_checkpoints(const fs::path& run_folder) {
  std::vector<int64_t> steps;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(run_folder, error)) {
    const int64_t step = step_of(entry.path().filename().string());
    if (step >= 0) steps.push_back(step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

std::optional<Checkpoint> latest_checkpoint(const fs::path& run_folder,
                                            const std::function<void(const std::string&)>& warn) {
  std::vector<int64_t> steps = list_checkpoints(run_folder);
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    try {
      return open_checkpoint(run_folder / (kPrefix + std::to_string(*step)));
    } catch (const Error& e) {
      if (warn) warn("passing over a checkpoint: " + std::string(e.what()));
    }
  }
  return std::nullopt;
}

void load_checkpoint(const Checkpoint& checkpoint, TrainableModel& model, Moments& moments,
                     DecodeState* stream_state) {
  const Config found = read_config(checkpoint.folder);
  const Config expected =
      config_from_json(config_to_json(model.config(), Dialect::hf), "the run's model");
  if (!(found == expected)) {
    throw Error("the checkpoint is of a model of another shape",
                (checkpoint.folder / "config.json").string(),
                config_to_json(model.config(), Dialect::hf), config_to_json(found, Dialect::hf));
  }
  const HostCopies copies(model, moments, stream_state);
  std::vector<NamedTensor> weights;
  for (const ParameterInfo& info : parameter_table(model.config())) {
    weights.push_back({info.name, info.of(copies.masters.parameters())});
  }
  read_tensors(checkpoint.folder / "model.safetensors", weights);
  read_tensors(checkpoint.folder / "optimizer.safetensors",
               optimizer_tensors(model.config(), copies));
  copies.write_back(model, moments, stream_state);
}

void export_model(const fs::path& checkpoint, const fs::path& run_folder) {
  const fs::path model = run_folder / "model";
  std::error_code error;
  fs::create_directories(model, error);
  if (error) throw Error("cannot create the folder: " + error.message(), model.string());
  for (const char* name :
       {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}) {
    if (!fs::exists(checkpoint / name)) continue;
    const MappedFile file(checkpoint / name);
    if (!fs::exists(model / name) || MappedFile(model / name).text() != file.text())
      write_file_atomic(model / name, file.text());
  }
}

void abandon_checkpoints(const fs::path& run_folder, int64_t step) {
  for (const int64_t later : list_checkpoints(run_folder)) {
    if (later <= step) continue;
    const std::string name = kPrefix + std::to_string(later);
    fs::path target = run_folder / ("abandoned-" + name);
    for (int i = 2; fs::exists(target); ++i)
      target = run_folder / ("abandoned-" + name + "." + std::to_string(i));
    fs::rename(run_folder / name, target);
  }
}

void prune_checkpoints(const fs::path& run_folder, int64_t keep) {
  std::vector<int64_t> steps = list_checkpoints(run_folder);
  std::error_code ignored;
  for (size_t i = 0; static_cast<int64_t>(steps.size() - i) > keep; ++i) {
    fs::remove_all(run_folder / (kPrefix + std::to_string(steps[i])), ignored);
  }
  std::vector<fs::path> leftovers;
  for (const auto& entry : fs::directory_iterator(run_folder, ignored)) {
    const std::string name = entry.path().filename().string();
    const size_t at = name.find(kTemporary);
    if (at != std::string::npos && step_of(name.substr(0, at)) >= 0)
      leftovers.push_back(entry.path());
  }
  for (const fs::path& path : leftovers) fs::remove_all(path, ignored);
}

}  // namespace krait
