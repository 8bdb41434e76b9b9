#include "core/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace krait {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kFirstBlock = size_t{1} << 20;

class HostMemory final : public std::pmr::memory_resource {
  void* do_allocate(size_t bytes, size_t alignment) override {
    const bool huge = bytes >= 2 * kHugePage;
    const size_t align = huge ? kHugePage : std::max(alignment, kAlignment);
    void* p = std::aligned_alloc(align, (bytes + align - 1) / align * align);
    if (!p) throw std::bad_alloc();
    if (huge) madvise(p, bytes, MADV_HUGEPAGE);  // a hint: failure changes nothing but speed
    return p;
  }
  void do_deallocate(void* p, size_t, size_t) override { std::free(p); }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

std::pmr::memory_resource* host_memory() {
  static HostMemory memory;
  return &memory;
}

Buffer::Buffer(size_t bytes, std::pmr::memory_resource* memory) : bytes_(bytes), memory_(memory) {
  if (bytes_) data_ = memory_->allocate(bytes_, kAlignment);
}

Buffer::~Buffer() {
  if (data_) memory_->deallocate(data_, bytes_, kAlignment);
}

void Buffer::swap(Buffer& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(memory_, other.memory_);
}

OwnedTensor::OwnedTensor(DType dtype, std::initializer_list<int64_t> shape)
    : view_(nullptr, dtype, shape) {
  buffer_ = Buffer(std::max<size_t>(view_.bytes(), 1));
  view_.data = buffer_.data();
  std::memset(view_.data, 0, view_.bytes());
}

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
