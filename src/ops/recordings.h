// Work that comes again and again in the same shape. Where the engine records (engine.h), it is
// queued op by op the first time, which brings the workspace to its size and makes the plans,
// recorded the second time, and from then on replayed: on a GPU one launch instead of thousands.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>

#include "ops/context.h"
#include "ops/engine.h"

namespace krait {

class Recordings {
 public:
  // Everything that tells one piece of work from another: shapes, addresses, numbers among the
  // arguments.
  using Key = std::array<int64_t, 6>;

  // Call it outside any Scope of the workspace, so that its memory is the same each time.
  template <class F>
  void run(Context& ctx, const Key& key, F&& body) {
    if (ctx.engine().record)
      run_recorded(ctx, key, body);
    else
      body();
  }
  // When memory that the work uses has moved; none of it is under way.
  void clear() { entries_.clear(); }

 private:
  void run_recorded(Context& ctx, const Key& key, const std::function<void()>& body);

  // By key; null: run once, not yet recorded.
  std::map<Key, std::shared_ptr<void>> entries_;
  int64_t workspace_blocks_ = 0;  // of the workspace that the recordings use
};

}  // namespace krait
