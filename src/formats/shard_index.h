// model.safetensors.index.json and pytorch_model.bin.index.json: {"metadata": {..}, "weight_map":
// {"tensor": "file", ..}}.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

inline constexpr size_t kMaxShards = 4096;

struct ShardIndex {
  struct Tensor {
    std::string name;
    uint32_t file;  // index into files
  };
  std::vector<Tensor> tensors;     // in the index's order, names differ
  std::vector<std::string> files;  // relative, none leaves the folder
};

// Throws Error at `where` (the index's file name) and the field.
ShardIndex read_shard_index(std::string_view text, const std::string& where);

}  // namespace krait
