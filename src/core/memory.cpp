#include "core/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace krait {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

class HeapMemory final : public HostMemory {
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

}  // namespace

// Of no bytes the addresses may be null, which memset and memcpy may not be given.
void HostMemory::zero(void* to, size_t bytes) {
  if (bytes > 0) std::memset(to, 0, bytes);
}
void HostMemory::upload(void* to, const void* host, size_t bytes) { copy(to, host, bytes); }
void HostMemory::download(void* host, const void* from, size_t bytes) { copy(host, from, bytes); }
void HostMemory::copy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

Memory& host_memory() {
  static HeapMemory memory;
  return memory;
}

Buffer::Buffer(size_t bytes, Memory& memory) : bytes_(bytes), memory_(&memory) {
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

OwnedTensor::OwnedTensor(DType dtype, std::initializer_list<int64_t> shape, Memory& memory)
    : view_(nullptr, dtype, shape) {
  buffer_ = Buffer(std::max<size_t>(view_.bytes(), 1), memory);
  view_.data = buffer_.data();
  zero();
}

}  // namespace krait
