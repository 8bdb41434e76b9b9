// Host side of vector.cuh: may the rows of a tensor be read V elements at a time?
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/tensor.h"

namespace krait::cuda {

// Every row of t starts on a boundary for vectors of V elements (at most 16 bytes are needed,
// longer vectors take several accesses) and is a whole number of them wide. None: true.
inline bool vector_rows(const Tensor& t, int V) {
  if (!t) return true;
  const size_t bytes = std::min<size_t>(16, static_cast<size_t>(V) * size_of(t.dtype));
  if (reinterpret_cast<uintptr_t>(t.data) % bytes != 0) return false;
  for (int d = 0; d + 1 < t.rank; ++d)
    if (static_cast<size_t>(t.stride[static_cast<size_t>(d)]) * size_of(t.dtype) % bytes != 0)
      return false;
  return t.shape[static_cast<size_t>(t.rank - 1)] % V == 0;
}

}  // namespace krait::cuda
