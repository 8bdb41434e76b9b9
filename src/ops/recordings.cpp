#include "ops/recordings.h"

namespace krait {
namespace {

constexpr size_t kMaxRecordings = 64;

}  // namespace

void Recordings::run_recorded(Context& ctx, const Key& key, const std::function<void()>& body) {
  const auto blocks = [&] { return ctx.workspace().block_allocations(); };
  if (blocks() != workspace_blocks_ || entries_.size() >= kMaxRecordings) clear();
  const auto entry = entries_.find(key);
  if (entry == entries_.end()) {
    body();
    if (blocks() != workspace_blocks_) clear();
    workspace_blocks_ = blocks();
    entries_[key] = nullptr;
    return;
  }
  if (!entry->second) entry->second = ctx.engine().record(ctx, body);
  ctx.engine().replay(ctx, entry->second);
}

}  // namespace krait
