// The first byte chooses: the whole archive, or only the pickle (an archive's checksum hides most
// of it from a fuzzer).
#include "formats/fuzz/touch.h"
#include "formats/pickle.h"
#include "formats/torch_zip.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const auto bytes = std::as_bytes(std::span(data + 1, size - 1));
  try {
    if (data[0] & 1) {
      krait::touch(krait::read_torch_zip(bytes, "input"));
    } else {
      const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
      krait::read_state_dict(text, "input", size_t{1} << 20);
    }
  } catch (const krait::Error&) {
  }
  return 0;
}
