#include "ops/recordings.h"

namespace krait {
namespace {

constexpr size_t kMaxRecordings = 64;

}  // namespace

void Recordings::run_recorded(Context& ctx, const Key& key, const std::function<void()>& body) {
  const auto forget = [&] {
    if (entries_.empty()) return;
    ctx.engine().synchronize(ctx);  // one may be at work
    clear();
  };
  const auto follow_workspace = [&] {
    const int64_t blocks = ctx.workspace().block_allocations();
    if (blocks != workspace_blocks_) forget();
    workspace_blocks_ = blocks;
  };
  follow_workspace();
  const auto entry = entries_.find(key);
  if (entry == entries_.end()) {
    body();
    follow_workspace();
    if (entries_.size() >= kMaxRecordings) forget();
    entries_[key] = nullptr;
    return;
  }
  if (!entry->second) entry->second = ctx.engine().record(ctx, body);
  ctx.engine().replay(ctx, entry->second);
}

}  // namespace krait
