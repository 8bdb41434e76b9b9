// safetensors: 8 bytes of header length N (little-endian), N bytes of JSON {"name": {"dtype",
// "shape", "data_offsets"}, ..,
// "__metadata__": {string: string}}, then the tensors' bytes, row-major, without holes.
// Source: the format section of https://github.com/huggingface/safetensors, whose checks are all
// made here.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <span>
#include <string>

#include "formats/tensor_table.h"

namespace krait {

inline constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;  // bytes, as upstream

// Tensors as views into `bytes`, which must outlive them. where: the file's name. Throws Error.
TensorTable read_safetensors(std::span<const std::byte> bytes, const std::string& where);

// Writes the file or leaves what was there. The data begins at a multiple of 64 bytes and larger
// element types come first, so that a mapped file has every tensor aligned to its element type.
// Throws Error (disk full, name not UTF-8).
void write_safetensors(const std::filesystem::path& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace krait
