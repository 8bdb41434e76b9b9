#include "ops/context.h"

#include "core/threads.h"
#include "ops/engine.h"

namespace krait {

Context::Context(const Engine& engine, int threads)
    : engine_(&engine),
      threads_(threads > 0 ? threads : available_cores()),
      workspace_(engine.memory()) {}

Memory& Context::memory() const { return engine_->memory(); }

void Context::side_by_side(int count, const std::function<void(Context&, int)>& work) {
  if (!engine_->follow || count == 1) {
    for (int i = 0; i < count; ++i) work(*this, i);
    return;
  }
  while (sides_.size() < static_cast<size_t>(count))
    sides_.push_back({std::make_unique<Context>(*engine_, threads_), nullptr});
  engine_->mark(*this, begin_);
  for (int i = 0; i < count; ++i) {
    Side& side = sides_[static_cast<size_t>(i)];
    side.context->batch_invariant = batch_invariant;
    engine_->follow(*side.context, begin_);
    const auto join = [&] {
      engine_->mark(*side.context, side.done);
      engine_->follow(*this, side.done);
    };
    try {
      work(*side.context, i);
    } catch (...) {
      join();  // what it has queued may use what the caller gives back now
      throw;
    }
    join();
  }
}

}  // namespace krait
