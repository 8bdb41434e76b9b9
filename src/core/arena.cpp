#include "core/arena.h"

#include <algorithm>

namespace krait {
namespace {

constexpr size_t kFirstBlock = size_t{1} << 20, kLargestShared = size_t{32} << 20;  // bytes

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void* Arena::allocate(size_t bytes) {
  bytes = aligned(std::max<size_t>(bytes, 1));
  Position& p = position_;
  while (p.block < blocks_.size() && p.used + bytes > blocks_[p.block].bytes()) {
    ++p.block;
    p.used = 0;
  }
  if (p.block == blocks_.size()) {
    const size_t shared = std::clamp(capacity(), kFirstBlock, kLargestShared);
    blocks_.emplace_back(std::max(bytes, shared), memory_);
    ++block_allocations_;
  }
  void* piece = static_cast<char*>(blocks_[p.block].data()) + p.used;
  p.used += bytes;
  p.taken += bytes;
  high_water_ = std::max(high_water_, p.taken);
  return piece;
}

Tensor Arena::tensor(DType dtype, std::initializer_list<int64_t> shape) {
  Tensor t(nullptr, dtype, shape);
  t.data = allocate(t.bytes());
  return t;
}

size_t Arena::capacity() const {
  size_t total = 0;
  for (const Buffer& b : blocks_) total += b.bytes();
  return total;
}

void Arena::release(const Position& to) {
  position_ = to;
  if (--depth_ == 0 && to.taken == 0 && blocks_.size() > 1) {
    blocks_.clear();  // give back first: the peak stays at one round's need
    blocks_.emplace_back(high_water_, memory_);
    ++block_allocations_;
  }
}

}  // namespace krait
