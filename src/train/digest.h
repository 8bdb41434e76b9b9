// CRC-32C (Castagnoli): the checksum of TensorBoard's records and of the files of a checkpoint.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#ifdef __SSE4_2__
#include <nmmintrin.h>
#else
#include <boost/crc.hpp>
#endif

namespace krait {

class Crc32c {
 public:
#ifdef __SSE4_2__  // the instruction computes this very polynomial, 8 bytes at a time
  void update(const void* data, size_t bytes) {
    const auto* p = static_cast<const unsigned char*>(data);
    uint64_t crc = crc_;
    for (; bytes >= 8; p += 8, bytes -= 8) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      crc = _mm_crc32_u64(crc, word);
    }
    crc_ = static_cast<uint32_t>(crc);
    for (; bytes > 0; ++p, --bytes) crc_ = _mm_crc32_u8(crc_, *p);
  }
  uint32_t value() const { return ~crc_; }
#else
  void update(const void* data, size_t bytes) { crc_.process_bytes(data, bytes); }
  uint32_t value() const { return crc_.checksum(); }
#endif
  void update(std::string_view text) { update(text.data(), text.size()); }

 private:
#ifdef __SSE4_2__
  uint32_t crc_ = 0xFFFFFFFF;
#else
  boost::crc_optimal<32, 0x1EDC6F41, 0xFFFFFFFF, 0xFFFFFFFF, true, true> crc_;
#endif
};

inline uint32_t crc32c(std::string_view text) {
  Crc32c crc;
  crc.update(text);
  return crc.value();
}

}  // namespace krait
