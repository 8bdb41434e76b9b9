// Where tensors live: the host's memory or a GPU's. `Buffer` owns one aligned block of it,
// `OwnedTensor` a tensor with its block.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory_resource>

#include "core/tensor.h"

namespace krait {

inline constexpr size_t kAlignment = 64;  // one cache line, one AVX-512 vector

// Allocates, and moves contents. Every transfer comes after all work queued before it and is
// complete when the call returns: for setting up and for results, not for the inside of a step
// (ops/elementwise.h has what runs in order with the ops). Throws Error when memory is exhausted.
class Memory : public std::pmr::memory_resource {
 public:
  virtual bool on_host() const = 0;  // the host may read and write it directly
  virtual void zero(void* to, size_t bytes) = 0;
  virtual void upload(void* to, const void* host, size_t bytes) = 0;
  virtual void download(void* host, const void* from, size_t bytes) = 0;
  virtual void copy(void* to, const void* from, size_t bytes) = 0;  // both in this memory
};

// Memory that the host reads and writes itself; subclasses say where it comes from.
class HostMemory : public Memory {
 public:
  bool on_host() const final { return true; }
  void zero(void* to, size_t bytes) final;
  void upload(void* to, const void* host, size_t bytes) final;
  void download(void* host, const void* from, size_t bytes) final;
  void copy(void* to, const void* from, size_t bytes) final;
};

// The host's memory, aligned to kAlignment. Large blocks ask the kernel for huge pages.
Memory& host_memory();

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes, Memory& memory = host_memory());
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  Memory& memory() const { return *memory_; }

 private:
  void swap(Buffer& other) noexcept;

  void* data_ = nullptr;
  size_t bytes_ = 0;
  Memory* memory_ = nullptr;
};

// A tensor together with its memory. Contents start as zero.
class OwnedTensor {
 public:
  OwnedTensor() = default;
  OwnedTensor(DType dtype, std::initializer_list<int64_t> shape, Memory& memory = host_memory());
  const Tensor& view() const { return view_; }
  operator const Tensor&() const { return view_; }
  const Tensor* operator->() const { return &view_; }
  Memory& memory() const { return buffer_.memory(); }

  void zero() { memory().zero(view_.data, view_.bytes()); }
  // All of it from or to the host; `host` is contiguous and has as many bytes.
  void upload(const void* host) { memory().upload(view_.data, host, view_.bytes()); }
  void download(void* host) const { memory().download(host, view_.data, view_.bytes()); }

 private:
  Buffer buffer_;
  Tensor view_;
};

}  // namespace krait
