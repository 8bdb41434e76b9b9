// Context: everything an op needs besides its arguments. The engine (which implementation runs),
// how many threads it may use, scratch memory, and the engine's own state (cached primitives; on a
// GPU its stream). One thread uses a Context at a time; on the CPU that thread is the one that
// enters OpenMP.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "core/arena.h"

namespace krait {

struct Engine;  // engine.h

class Context {
 public:
  // threads: 0 takes the number of cores this process may run on.
  explicit Context(const Engine& engine, int threads = 0);

  const Engine& engine() const { return *engine_; }
  int threads() const { return threads_; }
  Memory& memory() const;  // where the engine's tensors live
  Arena& workspace() { return workspace_; }

  // Products, norms and decoder steps whose result for a row does not depend on how many rows there
  // are (docs/numerics.md); slower.
  bool batch_invariant = false;

  // Pieces of work that do not depend on each other, work(context, i) for i in [0, count). Where
  // the engine's contexts can work side by side (Engine::follow), each gets a context of its own,
  // which begins behind all that was queued here before, and what is queued here later comes behind
  // them all; else one is done after the other. A piece's scratch memory is its context's, which
  // a recording (recordings.h) does not know: not for work that is recorded.
  void side_by_side(int count, const std::function<void(Context&, int)>& work);

  // Made by the engine on first use, owned here.
  template <class T>
  T& engine_state() {
    if (!engine_state_) engine_state_ = std::make_shared<T>();
    return *static_cast<T*>(engine_state_.get());
  }

 private:
  const Engine* engine_;
  int threads_;
  std::shared_ptr<void> engine_state_;
  Arena workspace_;

  struct Side {
    std::unique_ptr<Context> context;
    std::shared_ptr<void> done;  // behind its last piece of work
  };
  std::vector<Side> sides_;
  std::shared_ptr<void> begin_;  // where the last pieces of work began
};

}  // namespace krait
