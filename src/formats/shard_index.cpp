#include "formats/shard_index.h"

#include <algorithm>
#include <filesystem>
#include <map>

#include "formats/json.h"
#include "formats/tensor_table.h"

namespace krait {
namespace {

// A shard's name comes from outside and is opened: it must stay below the index's folder.
bool stays_inside(const std::string& name) {
  if (name.empty() || name.find('\0') != std::string::npos || name.find('\\') != std::string::npos)
    return false;
  const std::filesystem::path path(name);
  return path.is_relative() && path.has_filename() &&
         std::all_of(path.begin(), path.end(), [](const auto& p) { return p != ".." && p != "."; });
}

class Reader : public JsonEvents {
 public:
  using JsonEvents::JsonEvents;

  ShardIndex index;

  bool start_object(size_t) override {
    if (skipping()) {
      ++depth_;
    } else if (depth_ == 0) {
      depth_ = 1;
    } else if (depth_ == 1 && member_ == "weight_map") {
      if (has_map_) throw Error("key given twice", at_field());
      has_map_ = true;
      depth_ = 2;
    } else {
      unexpected("an object");
    }
    return true;
  }
  bool end_object() override {
    if (--depth_ == 0 && !has_map_) throw Error("field missing", where() + ": weight_map");
    return true;
  }
  bool key(std::string& key) override {
    if (depth_ == 1) member_ = key;
    if (depth_ == 2 && !skipping()) name_ = key;
    return true;
  }
  bool string(std::string& value) override {
    if (skipping()) return true;
    if (depth_ != 2) unexpected(in_quotes(value));
    if (!stays_inside(value))
      throw Error("shard outside the folder", at_field(), "a file name without \"..\"",
                  in_quotes(value));
    if (index.tensors.size() >= kMaxTensors)
      throw Error("too many tensors", where(), "at most " + std::to_string(kMaxTensors));
    const auto [file, is_new] =
        files_.try_emplace(value, static_cast<uint32_t>(index.files.size()));
    if (is_new) index.files.push_back(value);
    if (index.files.size() > kMaxShards)
      throw Error("too many shards", where(), "at most " + std::to_string(kMaxShards));
    index.tensors.push_back({name_, file->second});
    return true;
  }
  // Members other than weight_map are of no use here, whatever they hold.
  bool null() override { return skipping() || JsonEvents::null(); }
  bool boolean(bool x) override { return skipping() || JsonEvents::boolean(x); }
  bool number_integer(int64_t x) override { return skipping() || JsonEvents::number_integer(x); }
  bool number_unsigned(uint64_t x) override { return skipping() || JsonEvents::number_unsigned(x); }
  bool number_float(double x, const std::string& text) override {
    return skipping() || JsonEvents::number_float(x, text);
  }
  bool start_array(size_t) override {
    if (!skipping()) unexpected("an array");
    ++depth_;
    return true;
  }
  bool end_array() override {
    --depth_;
    return true;
  }

 protected:
  std::string field() const override {
    if (depth_ == 0) return {};
    return depth_ == 1 ? member_ : "weight_map: " + in_quotes(name_);
  }
  std::string expected() const override {
    return depth_ == 2 ? "a file name" : "an object with a member weight_map";
  }

 private:
  bool skipping() const { return depth_ >= 1 && !member_.empty() && member_ != "weight_map"; }

  int depth_ = 0;  // of open brackets; 2 is inside weight_map
  std::string member_, name_;
  bool has_map_ = false;
  std::map<std::string, uint32_t> files_;
};

}  // namespace

ShardIndex read_shard_index(std::string_view text, const std::string& where) {
  Reader reader(where);
  parse_json_events(text, reader);
  std::vector<std::string_view> names;
  for (const ShardIndex::Tensor& t : reader.index.tensors) names.push_back(t.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end())
    throw Error("key given twice", where + ": weight_map: " + in_quotes(*twice));
  return std::move(reader.index);
}

}  // namespace krait
