#include "core/tensor.h"

namespace krait {

Tensor::Tensor(void* data_, DType dtype_, std::initializer_list<int64_t> shape_)
    : data(data_), dtype(dtype_), rank(static_cast<int>(shape_.size())) {
  KRAIT_CHECK(rank >= 1 && rank <= kMaxRank);
  int i = 0;
  for (int64_t extent : shape_) shape[static_cast<size_t>(i++)] = extent;
  int64_t step = 1;
  for (i = rank - 1; i >= 0; --i) {
    stride[static_cast<size_t>(i)] = step;
    step *= shape[static_cast<size_t>(i)];
  }
}

int64_t Tensor::size() const {
  if (rank == 0) return 0;
  int64_t n = 1;
  for (int i = 0; i < rank; ++i) n *= shape[static_cast<size_t>(i)];
  return n;
}

bool Tensor::contiguous() const {
  int64_t step = 1;
  for (int i = rank - 1; i >= 0; --i) {
    const auto d = static_cast<size_t>(i);
    if (shape[d] != 1 && stride[d] != step) return false;
    step *= shape[d];
  }
  return true;
}

Tensor Tensor::slice(int dim, int64_t begin, int64_t end) const {
  KRAIT_CHECK(dim >= 0 && dim < rank);
  const auto d = static_cast<size_t>(dim);
  KRAIT_CHECK(begin >= 0 && begin <= end && end <= shape[d]);
  Tensor part = *this;
  part.data = static_cast<char*>(data) + begin * stride[d] * static_cast<int64_t>(size_of(dtype));
  part.shape[d] = end - begin;
  return part;
}

Tensor Tensor::reshape(std::initializer_list<int64_t> shape_) const {
  Tensor other(data, dtype, shape_);
  KRAIT_CHECK(contiguous() && other.size() == size());
  return other;
}

std::string shape_string(const Tensor& t) {
  if (!t) return "none";
  std::string s = "(";
  for (int i = 0; i < t.rank; ++i)
    s += (i ? ", " : "") + std::to_string(t.shape[static_cast<size_t>(i)]);
  return s + ") " + name_of(t.dtype);
}

Tensor broadcast_rows(const Tensor& row, int64_t count) {
  KRAIT_CHECK(row.rank >= 1 && row.rank < Tensor::kMaxRank);
  Tensor t;
  t.data = row.data;
  t.dtype = row.dtype;
  t.rank = row.rank + 1;
  t.shape[0] = count;
  for (size_t i = 0; i < static_cast<size_t>(row.rank); ++i) {
    t.shape[i + 1] = row.shape[i];
    t.stride[i + 1] = row.stride[i];
  }
  return t;
}

}  // namespace krait
