#include "formats/tensor_table.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "core/checked.h"
#include "core/error.h"

namespace krait {

void FileShape::add(uint64_t extent, const std::string& where) {
  if (extent == 0) empty_ = true;
  if (extent > 1) product_ = checked_mul(product_, extent, where);
  if (product_ > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
    throw Error("number too large", where, "at most 2^63 - 1 elements");
  if (rank_ < extents_.size()) extents_[rank_] = static_cast<int64_t>(extent);
  ++rank_;
}

Tensor FileShape::view(const std::byte* data, DType dtype) const {
  KRAIT_CHECK(rank_ <= extents_.size());
  Tensor t;
  // Tensor has one pointer type for what is read and what is written; views of files are only ever
  // read.
  t.data = const_cast<std::byte*>(data);
  t.dtype = dtype;
  t.rank = std::max(1, static_cast<int>(rank_));
  t.shape = extents_;
  if (rank_ == 0) t.shape[0] = 1;
  int64_t step = 1;
  for (size_t i = static_cast<size_t>(t.rank); i-- > 0;) {
    t.stride[i] = step;
    step *= std::max<int64_t>(t.shape[i], 1);
  }
  return t;
}

std::vector<uint32_t> sorted_by_name(const std::vector<TensorEntry>& entries,
                                     const std::string& where) {
  std::vector<uint32_t> order(entries.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return entries[a].name < entries[b].name; });
  for (size_t i = 1; i < order.size(); ++i)
    if (entries[order[i - 1]].name == entries[order[i]].name)
      throw Error("tensor given twice", where + ": tensor " + in_quotes(entries[order[i]].name));
  return order;
}

void check_writable(std::span<const NamedTensor> tensors, const std::string& where) {
  std::set<std::string_view> names;
  for (const NamedTensor& t : tensors) {
    KRAIT_CHECK(!t.name.empty() && names.insert(t.name).second,
                where + ": name " + in_quotes(t.name));
    KRAIT_CHECK(t.tensor && t.tensor.contiguous(), where + ": tensor " + in_quotes(t.name));
  }
}

}  // namespace krait
