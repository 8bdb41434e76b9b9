// Tensor: a view of memory that somebody else owns. Up to four dimensions, any strides. A Tensor of
// rank 0 means "none": how optional arguments of ops are left out. Views of read-only memory
// (mapped weights) are only ever passed as inputs.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/dtype.h"
#include "core/error.h"

namespace krait {

struct Tensor {
  static constexpr int kMaxRank = 4;

  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;                            // 0: none
  std::array<int64_t, kMaxRank> shape{};   // extents; 0 is allowed
  std::array<int64_t, kMaxRank> stride{};  // in elements

  Tensor() = default;
  // A row-major view: the last dimension is contiguous.
  Tensor(void* data, DType dtype, std::initializer_list<int64_t> shape);

  explicit operator bool() const { return rank != 0; }
  int64_t size() const;  // elements; 0 for none
  size_t bytes() const { return static_cast<size_t>(size()) * size_of(dtype); }
  bool contiguous() const;  // row-major without gaps

  // Typed access; throws CheckFailure when T is not the element type.
  template <class T>
  T* ptr() const {
    KRAIT_CHECK(dtype == dtype_of<std::remove_const_t<T>>(),
                std::string("element type is ") + name_of(dtype));
    return static_cast<T*>(data);
  }
  // Start of row i of the first dimension.
  template <class T>
  T* row(int64_t i) const {
    return ptr<T>() + i * stride[0];
  }

  // Part [begin, end) of dimension `dim`, sharing memory.
  Tensor slice(int dim, int64_t begin, int64_t end) const;
  // The same memory with another shape; this view must be contiguous and the sizes equal.
  Tensor reshape(std::initializer_list<int64_t> shape) const;
};

std::string shape_string(const Tensor&);  // "(3, 4) f32"

// `count` rows that are all the one given: stride 0 along a new first dimension.
Tensor broadcast_rows(const Tensor& row, int64_t count);

}  // namespace krait
