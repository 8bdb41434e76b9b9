#include "core/arena.h"

#include <algorithm>

namespace krait {
namespace {

constexpr size_t kFirstBlock = size_t{1} << 20;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void* Arena::allocate(size_t bytes) {
  bytes = aligned(std::max<size_t>(bytes, 1));
  while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].bytes()) {
    ++block_;
    used_ = 0;
  }
  if (block_ == blocks_.size()) {
    blocks_.emplace_back(std::max({bytes, capacity(), kFirstBlock}), memory_);
    ++block_allocations_;
  }
  void* p = static_cast<char*>(blocks_[block_].data()) + used_;
  used_ += bytes;
  size_t taken = used_;
  for (size_t i = 0; i < block_; ++i) taken += blocks_[i].bytes();
  high_water_ = std::max(high_water_, taken);
  return p;
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

void Arena::release(size_t block, size_t used) {
  block_ = block;
  used_ = used;
  if (--depth_ == 0 && block_ == 0 && used_ == 0 && blocks_.size() > 1) {
    blocks_.clear();  // give back first: the peak stays at one round's need
    blocks_.emplace_back(high_water_, memory_);
    ++block_allocations_;
  }
}

}  // namespace krait
