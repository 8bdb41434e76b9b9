// Named tensors of a model's weight files, mapped: nothing is copied, pages are read when they are
// touched. Opening takes time and memory in proportion to the number of tensors, not to their size.
//
// The files stay as they are while a TensorFile is open: cutting one short under a mapping is fatal
// (SIGBUS) on any system.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/mapped_file.h"
#include "formats/tensor_table.h"

namespace krait {

// Whether the data may be read through a pointer to its element type. Files need not align their
// tensors; ours do, and torch's do.
bool aligned(const Tensor& tensor);

class TensorFile {
 public:
  // One .safetensors, one .bin / .pt / .pth of PyTorch, or one *.index.json that names shards of
  // either kind beside it. Throws Error naming the file and field.
  static TensorFile open(const std::filesystem::path& path);
  // The weights of a model's folder: model.safetensors, else model.safetensors.index.json, else
  // pytorch_model.bin, else pytorch_model.bin.index.json.
  static TensorFile open_folder(const std::filesystem::path& folder);

  TensorFile(TensorFile&&) = default;
  TensorFile& operator=(TensorFile&&) = default;
  TensorFile(const TensorFile&) = delete;
  TensorFile& operator=(const TensorFile&) = delete;

  // Read-only views, row-major, valid while this object lives (moving it included). A scalar has
  // shape (1). Views may be misaligned, see aligned(). A tensor that is there but cannot be used
  // (element type, more than 4 dimensions, not contiguous) is an Error in both.
  const Tensor* find(std::string_view name) const;  // null: not there
  const Tensor& at(std::string_view name) const;    // not there: Error

  bool contains(std::string_view name) const { return find_item(name) != nullptr; }
  std::vector<std::string> names()
      const;  // in the file's (the index's) order, also of tensors that cannot be used
  size_t size() const { return items_.size(); }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  const std::filesystem::path& path() const { return path_; }  // what was opened
  std::string file_of(
      std::string_view name) const;  // the file that holds this tensor; not there: Error
  std::string dtype_of(std::string_view name) const;  // as the file spells it; not there: Error

 private:
  struct Item {
    TensorEntry entry;
    uint32_t file;  // index into files_
  };

  TensorFile() = default;
  TensorTable add_file(const std::filesystem::path& path);
  void add_sharded(const std::filesystem::path& index);
  void sort();
  const Item* find_item(std::string_view name) const;
  const Item& item(std::string_view name) const;

  std::filesystem::path path_;
  std::vector<MappedFile> files_;
  std::vector<Item> items_;
  std::vector<uint32_t> sorted_;  // items by name
  std::map<std::string, std::string> metadata_;
};

}  // namespace krait
