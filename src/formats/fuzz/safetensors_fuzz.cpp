#include "formats/fuzz/touch.h"
#include "formats/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    krait::touch(krait::read_safetensors(std::as_bytes(std::span(data, size)), "input"));
  } catch (const krait::Error&) {
  }
  return 0;
}
