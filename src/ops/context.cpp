#include "ops/context.h"

#include "core/threads.h"
#include "ops/engine.h"

namespace krait {

Context::Context(const Engine& engine, int threads)
    : engine_(&engine),
      threads_(threads > 0 ? threads : available_cores()),
      workspace_(engine.memory()) {}

Memory& Context::memory() const { return engine_->memory(); }

}  // namespace krait
