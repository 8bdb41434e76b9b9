// The pickle inside a PyTorch weight file, read by a machine that can build dicts, lists, tuples,
// strings, numbers and tensor descriptions and nothing else. A global is a name matched against a
// fixed table: nothing is looked up, imported or called, so a pickle can state data and no more.
// Anything beyond that is an Error naming the opcode or global.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"

namespace krait {

struct StorageType {
  const char* name;            // as torch calls it: "FloatStorage"
  size_t bytes;                // of one element
  std::optional<DType> dtype;  // none: known, but no Tensor can hold it
};

const StorageType& storage_type_of(DType dtype);

// A tensor as pickled: part of a storage, which is a record of its own in the archive. Nothing here
// is checked against it.
struct PickledTensor {
  const StorageType* type = nullptr;
  std::string_view key;               // of the storage, in the pickle's bytes
  int64_t numel = 0;                  // elements of the storage, >= 0
  int64_t offset = 0;                 // elements, >= 0
  std::vector<int64_t> size, stride;  // equally many, size >= 0
};

struct PickledEntry {
  std::string_view name;     // in the pickle's bytes
  std::string_view problem;  // not a tensor: says what it is
  PickledTensor tensor;
};

// The members of the dict that the pickle builds, in its order. memory: how many bytes of heap it
// may take, about.
std::vector<PickledEntry> read_state_dict(std::string_view pickle, const std::string& where,
                                          size_t memory);

}  // namespace krait
