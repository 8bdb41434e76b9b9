#include "ops/mirrored_tensor.h"

#include "core/error.h"
#include "ops/elementwise.h"
#include "ops/engine.h"

namespace krait {

MirroredTensor::MirroredTensor(Context& ctx, DType dtype, std::initializer_list<int64_t> shape,
                               int mirrors)
    : ctx_(&ctx), tensor_(dtype, shape, ctx.memory()) {
  if (ctx.memory().on_host()) return;
  for (int i = 0; i < mirrors; ++i)
    mirrors_.push_back({OwnedTensor(dtype, shape, ctx.engine().transfer_memory()), nullptr});
}

const Tensor& MirroredTensor::host() const {
  if (mirrors_.empty()) return tensor_.view();
  const Mirror& mirror = mirrors_[current_];
  ctx_->engine().wait(*ctx_, mirror.last_use);
  return mirror.tensor.view();
}

void MirroredTensor::upload(int64_t count) {
  if (mirrors_.empty()) return;
  Mirror& mirror = mirrors_[current_];
  copy_elements(*ctx_, mirror.tensor->slice(0, 0, count), view().slice(0, 0, count));
  ctx_->engine().mark(*ctx_, mirror.last_use);
  current_ = (current_ + 1) % mirrors_.size();
}

void MirroredTensor::download(int64_t count) {
  if (mirrors_.empty()) return;
  KRAIT_CHECK(mirrors_.size() == 1);
  Mirror& mirror = mirrors_[0];
  copy_elements(*ctx_, view().slice(0, 0, count), mirror.tensor->slice(0, 0, count));
  ctx_->engine().mark(*ctx_, mirror.last_use);
}

}  // namespace krait
