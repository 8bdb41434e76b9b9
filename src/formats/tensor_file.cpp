#include "formats/tensor_file.h"

#include <algorithm>
#include <numeric>
#include <span>

#include "core/error.h"
#include "formats/safetensors.h"
#include "formats/shard_index.h"
#include "formats/torch_zip.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kLfsPointer = "version https://git-lfs.github.com/spec/";

}  // namespace

bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % size_of(tensor.dtype) == 0;
}

// Maps one weight file and reads its table. The tables' views stay valid: a mapping does not move.
TensorTable TensorFile::add_file(const fs::path& path) {
  const fs::path extension = path.extension();
  const bool is_torch = extension == ".bin" || extension == ".pt" || extension == ".pth";
  if (!is_torch && extension != ".safetensors")
    throw Error("unknown kind of weight file", path.string(), ".safetensors, .bin, .pt or .pth");
  MappedFile file(path);
  if (file.text().starts_with(kLfsPointer))
    throw Error("a Git LFS pointer, not the weights: fetch them with git lfs pull", path.string());
  const std::span bytes(file.data(), file.size());
  TensorTable table =
      is_torch ? read_torch_zip(bytes, path.string()) : read_safetensors(bytes, path.string());
  files_.push_back(std::move(file));
  return table;
}

void TensorFile::add_sharded(const fs::path& index_path) {
  const MappedFile file(index_path);
  const std::string where = index_path.string();
  ShardIndex index = read_shard_index(file.text(), where);
  if (index.tensors.empty()) throw Error("no tensors", where + ": weight_map");
  struct Shard {
    TensorTable table;
    std::vector<uint32_t> sorted;
  };
  std::vector<Shard> shards;
  size_t total = 0;
  for (const std::string& name : index.files) {
    const fs::path path = index_path.parent_path() / name;
    Shard& shard = shards.emplace_back();
    shard.table = add_file(path);
    shard.sorted = sorted_by_name(shard.table.entries, path.string());
    metadata_.merge(shard.table.metadata);
    total += shard.table.entries.size();
    if (total > kMaxTensors)
      throw Error("too many tensors", where, "at most " + std::to_string(kMaxTensors));
  }
  for (ShardIndex::Tensor& t : index.tensors) {
    Shard& shard = shards[t.file];
    std::vector<TensorEntry>& entries = shard.table.entries;
    const auto found = std::lower_bound(
        shard.sorted.begin(), shard.sorted.end(), t.name,
        [&](uint32_t i, const std::string& name) { return entries[i].name < name; });
    if (found == shard.sorted.end() || entries[*found].name != t.name)
      throw Error("tensor missing from its shard", where + ": weight_map: " + in_quotes(t.name),
                  "it in " + in_quotes(index.files[t.file]));
    items_.push_back({entries[*found], t.file});
  }
}

TensorFile TensorFile::open(const fs::path& path) {
  TensorFile file;
  file.path_ = path;
  if (path.string().ends_with(".index.json")) {
    file.add_sharded(path);
  } else {
    TensorTable table = file.add_file(path);
    file.items_.reserve(table.entries.size());
    for (TensorEntry& e : table.entries) file.items_.push_back({std::move(e), 0});
    file.metadata_ = std::move(table.metadata);
  }
  file.sort();
  return file;
}

TensorFile TensorFile::open_folder(const fs::path& folder) {
  constexpr const char* kNames[] = {"model.safetensors", "model.safetensors.index.json",
                                    "pytorch_model.bin", "pytorch_model.bin.index.json"};
  std::error_code ignored;
  require_folder(folder);
  std::string looked_for;
  for (const char* name : kNames) {
    if (fs::exists(folder / name, ignored)) return open(folder / name);
    looked_for += (looked_for.empty() ? "" : ", ") + std::string(name);
  }
  throw Error("no weights in this folder", folder.string(), "one of " + looked_for);
}

void TensorFile::sort() {
  sorted_.resize(items_.size());
  std::iota(sorted_.begin(), sorted_.end(), 0u);
  std::sort(sorted_.begin(), sorted_.end(),
            [&](uint32_t a, uint32_t b) { return items_[a].entry.name < items_[b].entry.name; });
}

const TensorFile::Item* TensorFile::find_item(std::string_view name) const {
  const auto found =
      std::lower_bound(sorted_.begin(), sorted_.end(), name,
                       [&](uint32_t i, std::string_view n) { return items_[i].entry.name < n; });
  return found != sorted_.end() && items_[*found].entry.name == name ? &items_[*found] : nullptr;
}

const TensorFile::Item& TensorFile::item(std::string_view name) const {
  const Item* found = find_item(name);
  if (!found) throw Error("tensor missing", path_.string() + ": tensor " + in_quotes(name));
  return *found;
}

const Tensor* TensorFile::find(std::string_view name) const {
  const Item* found = find_item(name);
  if (found && !found->entry.problem.empty())
    throw Error(found->entry.problem,
                files_[found->file].path().string() + ": tensor " + in_quotes(name));
  return found ? &found->entry.tensor : nullptr;
}

const Tensor& TensorFile::at(std::string_view name) const {
  item(name);  // throws if it is not there
  return *find(name);
}

std::vector<std::string> TensorFile::names() const {
  std::vector<std::string> out;
  out.reserve(items_.size());
  for (const Item& i : items_) out.push_back(i.entry.name);
  return out;
}

std::string TensorFile::file_of(std::string_view name) const {
  return files_[item(name).file].path().string();
}

std::string TensorFile::dtype_of(std::string_view name) const { return item(name).entry.dtype; }

}  // namespace krait
