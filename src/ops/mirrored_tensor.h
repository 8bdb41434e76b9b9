// A tensor of the engine that the host fills or reads during a computation. Where the host reaches
// the engine's memory that is all there is; elsewhere it has mirrors in transfer memory, and copies
// between the two run in order with the ops, without a wait.
#pragma once

#include <memory>
#include <vector>

#include "core/memory.h"
#include "ops/context.h"

namespace krait {

class MirroredTensor {
 public:
  MirroredTensor() = default;
  // mirrors: uploads that may be under way before host() has to wait for the oldest; a tensor that
  // is downloaded has one. ctx outlives this.
  MirroredTensor(Context& ctx, DType dtype, std::initializer_list<int64_t> shape, int mirrors = 1);

  const Tensor& view() const { return tensor_.view(); }  // the engine's
  operator const Tensor&() const { return tensor_.view(); }
  // For the host, as the last download has filled it or to be filled before an upload; waits until
  // no transfer uses it.
  const Tensor& host() const;
  template <class T>
  T* host_ptr() const {
    return host().ptr<T>();
  }
  void upload(int64_t count);    // the first `count` of dimension 0; the mirror is then another one
  void download(int64_t count);  // the same, to the host

 private:
  struct Mirror {
    OwnedTensor tensor;
    std::shared_ptr<void> last_use;
  };

  Context* ctx_ = nullptr;
  OwnedTensor tensor_;
  std::vector<Mirror> mirrors_;  // none: the host reaches tensor_
  size_t current_ = 0;
};

}  // namespace krait
