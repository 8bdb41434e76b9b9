#include "core/xxh64.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace krait {
namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F,
                   kPrime3 = 0x165667B19E3779F9, kPrime4 = 0x85EBCA77C2B2AE63,
                   kPrime5 = 0x27D4EB2F165667C5;
constexpr size_t kBlock = 32;

static_assert(std::endian::native == std::endian::little, "words are read as they lie");

template <class Word>
uint64_t word_at(const unsigned char* p) {
  Word word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

uint64_t round(uint64_t lane, uint64_t word) {
  return std::rotl(lane + word * kPrime2, 31) * kPrime1;
}

uint64_t merge(uint64_t hash, uint64_t lane) { return (hash ^ round(0, lane)) * kPrime1 + kPrime4; }

const unsigned char* take_blocks(std::array<uint64_t, 4>& lanes, const unsigned char* p,
                                 size_t blocks) {
  std::array<uint64_t, 4> v = lanes;  // in registers
  for (; blocks > 0; --blocks, p += kBlock)
    for (size_t i = 0; i < 4; ++i) v[i] = round(v[i], word_at<uint64_t>(p + 8 * i));
  lanes = v;
  return p;
}

}  // namespace

Xxh64::Xxh64() : lanes_{kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1} {}

void Xxh64::update(const void* data, size_t bytes) {
  if (bytes == 0) return;
  const auto* p = static_cast<const unsigned char*>(data);
  const size_t held = bytes_ % kBlock;
  bytes_ += bytes;
  if (held > 0) {
    const size_t taken = std::min(bytes, kBlock - held);
    std::memcpy(rest_.data() + held, p, taken);
    p += taken;
    bytes -= taken;
    if (held + taken < kBlock) return;
    take_blocks(lanes_, rest_.data(), 1);
  }
  p = take_blocks(lanes_, p, bytes / kBlock);
  std::memcpy(rest_.data(), p, bytes % kBlock);
}

uint64_t Xxh64::value() const {
  uint64_t hash = kPrime5;
  if (bytes_ >= kBlock) {
    hash = std::rotl(lanes_[0], 1) + std::rotl(lanes_[1], 7) + std::rotl(lanes_[2], 12) +
           std::rotl(lanes_[3], 18);
    for (const uint64_t lane : lanes_) hash = merge(hash, lane);
  }
  hash += bytes_;
  const unsigned char *p = rest_.data(), *const end = p + bytes_ % kBlock;
  for (; end - p >= 8; p += 8)
    hash = std::rotl(hash ^ round(0, word_at<uint64_t>(p)), 27) * kPrime1 + kPrime4;
  for (; end - p >= 4; p += 4)
    hash = std::rotl(hash ^ word_at<uint32_t>(p) * kPrime1, 23) * kPrime2 + kPrime3;
  for (; p < end; ++p) hash = std::rotl(hash ^ *p * kPrime5, 11) * kPrime1;
  hash = (hash ^ hash >> 33) * kPrime2;
  hash = (hash ^ hash >> 29) * kPrime3;
  return hash ^ hash >> 32;
}

std::string hex_digits(uint64_t value) {
  std::string text(16, '0');
  for (size_t i = 16; i-- > 0; value >>= 4) text[i] = "0123456789abcdef"[value & 15];
  return text;
}

}  // namespace krait
