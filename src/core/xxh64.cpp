#include "core/xxh64.h"

#include <xxhash.h>

#include <new>

#include "core/error.h"

namespace krait {

Xxh64::Xxh64() : state_(XXH64_createState()) {
  if (!state_) throw std::bad_alloc();
  KRAIT_CHECK(XXH64_reset(state_.get(), 0) == XXH_OK);
}

void Xxh64::Free::operator()(XXH64_state_s* state) const { XXH64_freeState(state); }

void Xxh64::update(const void* data, size_t bytes) {
  if (bytes > 0) KRAIT_CHECK(XXH64_update(state_.get(), data, bytes) == XXH_OK);
}

uint64_t Xxh64::value() const { return XXH64_digest(state_.get()); }

std::string hex_digits(uint64_t value) {
  std::string text(16, '0');
  for (size_t i = 16; i-- > 0; value >>= 4) text[i] = "0123456789abcdef"[value & 15];
  return text;
}

}  // namespace krait
