// What the readers of weight files give: the tensors of one file by name, as views into its bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace krait {

inline constexpr size_t kMaxTensors = size_t{1}
                                      << 17;  // of one file; a bound on the heap a file may ask for

struct TensorEntry {
  std::string name;
  std::string dtype;    // as the file spells it: "BF16", "torch.FloatStorage"
  Tensor tensor;        // none when `problem` is not empty
  std::string problem;  // why it cannot be used here: "unsupported element type", ...
};

struct TensorTable {
  std::vector<TensorEntry> entries;             // in the file's order, names differ
  std::map<std::string, std::string> metadata;  // safetensors' __metadata__
};

struct NamedTensor {
  std::string name;
  Tensor tensor;
};

// The shape of a tensor in a file, gathered dimension by dimension. Every number is checked: no
// product of extents that are not zero exceeds 2^63 - 1, so strides cannot overflow either.
class FileShape {
 public:
  void add(uint64_t extent, const std::string& where);  // throws Error
  size_t rank() const { return rank_; }
  uint64_t elements() const { return empty_ ? 0 : product_; }
  // A row-major view with this shape; rank 0 becomes (1). rank() <= Tensor::kMaxRank.
  Tensor view(const std::byte* data, DType dtype) const;

 private:
  std::array<int64_t, Tensor::kMaxRank> extents_{};
  size_t rank_ = 0;
  uint64_t product_ = 1;  // of the extents that are not zero
  bool empty_ = false;
};

// Positions of the entries in the order of their names; a name that occurs twice is an Error at
// `where`.
std::vector<uint32_t> sorted_by_name(const std::vector<TensorEntry>& entries,
                                     const std::string& where);

// Requirements of both writers: every tensor is there and contiguous, names differ and none is
// empty.
void check_writable(std::span<const NamedTensor> tensors, const std::string& where);

}  // namespace krait
