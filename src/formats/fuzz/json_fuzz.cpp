// The first byte chooses: JSON in general, or a shard index.
#include <cstddef>
#include <cstdint>

#include "core/error.h"
#include "formats/json.h"
#include "formats/shard_index.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    if (data[0] & 1)
      krait::read_shard_index(text, "input");
    else
      krait::parse_json(text, "input");
  } catch (const krait::Error&) {
  }
  return 0;
}
