#include "krait/state.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "generate/generator.h"

namespace krait {
namespace {

constexpr char kMagic[8] = {'k', 'r', 'a', 'i', 't', 's', 't', '2'};

struct Header {
  char magic[8];
  int64_t pending;
  int64_t tokens;
  uint64_t recent;  // tokens
  uint64_t memory;  // bytes
};

}  // namespace

std::vector<std::byte> State::to_bytes() const {
  Header header = {{}, pending_, tokens_, recent_.size(), memory_.size()};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  const std::span<const std::byte> recent = std::as_bytes(std::span(recent_));
  std::vector<std::byte> out(sizeof header + recent.size() + memory_.size());
  std::memcpy(out.data(), &header, sizeof header);
  std::copy(recent.begin(), recent.end(), out.begin() + sizeof header);
  std::copy(memory_.rbegin(), memory_.rend(), out.rbegin());
  return out;
}

State State::from_bytes(std::span<const std::byte> bytes) {
  Header header;
  if (bytes.size() < sizeof header || std::memcmp(bytes.data(), kMagic, sizeof kMagic) != 0)
    throw Error("no saved state", "state", "the bytes that State::to_bytes gave");
  std::memcpy(&header, bytes.data(), sizeof header);
  const size_t left = bytes.size() - sizeof header;
  if (header.recent > left / sizeof(int32_t) ||
      header.memory != left - header.recent * sizeof(int32_t) || header.pending < -1 ||
      header.pending > INT32_MAX || header.tokens < 0)
    throw Error("damaged", "state", "the bytes that State::to_bytes gave");
  State state;
  state.pending_ = static_cast<int32_t>(header.pending);
  state.tokens_ = header.tokens;
  state.recent_.resize(header.recent);
  std::copy_n(bytes.begin() + sizeof header, header.recent * sizeof(int32_t),
              std::as_writable_bytes(std::span(state.recent_)).begin());
  const int64_t recent = static_cast<int64_t>(state.recent_.size());
  const int64_t last = recent > 0 ? state.recent_.back() : -1;
  if (recent != std::min(header.tokens, static_cast<int64_t>(kRecentTokens)) ||
      last != header.pending)
    throw Error("damaged", "state", "the bytes that State::to_bytes gave");
  state.memory_.assign(bytes.end() - static_cast<std::ptrdiff_t>(header.memory), bytes.end());
  return state;
}

}  // namespace krait
