// Arena: hands out pieces of a few blocks of memory and takes them back all at once (a Scope).
// After the first round of a repeated computation it holds one block of the right size and
// allocates no more. The first round takes little more: its blocks are small, or what one piece
// needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "core/memory.h"

namespace krait {

class Arena {
 private:
  struct Position {
    size_t block = 0, used = 0;  // block number, and bytes used of it
    size_t taken = 0;            // bytes of all pieces before it
  };

 public:
  explicit Arena(Memory& memory = host_memory()) : memory_(memory) {}
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Uninitialised memory, valid until the Scope in which it was taken ends. Rows of tensors are
  // contiguous.
  void* allocate(size_t bytes);
  Tensor tensor(DType dtype, std::initializer_list<int64_t> shape);
  template <class T>
  T* array(int64_t count) {
    return static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)));
  }

  // Everything allocated while a Scope lives is given back when it ends. Scopes nest.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), begin_(arena.position_) { ++arena.depth_; }
    ~Scope() { arena_.release(begin_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    Position begin_;
  };

  size_t capacity() const;                                          // bytes held
  int64_t block_allocations() const { return block_allocations_; }  // how often it asked for memory

 private:
  void release(const Position& to);

  Memory& memory_;
  std::vector<Buffer> blocks_;
  Position position_;
  size_t high_water_ = 0;  // most bytes ever taken at once
  int depth_ = 0;
  int64_t block_allocations_ = 0;
};

}  // namespace krait
