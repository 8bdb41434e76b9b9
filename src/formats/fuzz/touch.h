// Reads every byte that a table's tensors claim, so that a sanitizer sees a view beyond its file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/error.h"
#include "formats/tensor_table.h"

namespace krait {

inline void touch(const TensorTable& table) {
  volatile uint8_t sum = 0;
  size_t budget = size_t{1} << 20;  // many views may cover the same bytes
  for (const TensorEntry& entry : table.entries) {
    const auto* bytes = static_cast<const uint8_t*>(entry.tensor.data);
    const size_t size = entry.tensor.bytes();
    if (size > 0) sum = static_cast<uint8_t>(sum + bytes[0] + bytes[size - 1]);
    for (size_t i = 0; i < size && budget > 0; ++i, --budget)
      sum = static_cast<uint8_t>(sum + bytes[i]);
  }
}

}  // namespace krait
