#include "ops/deferred_engine.h"

#include <cstring>
#include <deque>
#include <vector>

namespace krait::op_test {
namespace {

using Work = std::function<void()>;
using Recording = std::vector<Work>;

std::deque<Work> queue;  // not yet done
int64_t queued = 0, done = 0, replays = 0;
Recording* recording = nullptr;  // takes what would be queued

void add(Work work) {
  if (recording) {
    recording->push_back(std::move(work));
    return;
  }
  queue.push_back(std::move(work));
  ++queued;
}

void work_until(int64_t count) {
  while (done < count) {
    queue.front()();
    queue.pop_front();
    ++done;
  }
}

// The ops' own scratch memory is not that of the context which queued them.
Context& executor() {
  static Context ctx(cpu_engine(), 1);
  return ctx;
}

class DeferredMemory final : public Memory {
 public:
  bool on_host() const override { return false; }
  void zero(void* to, size_t bytes) override {
    wait();
    std::memset(to, 0, bytes);
  }
  void upload(void* to, const void* host, size_t bytes) override { copy(to, host, bytes); }
  void download(void* host, const void* from, size_t bytes) override { copy(host, from, bytes); }
  void copy(void* to, const void* from, size_t bytes) override {
    wait();
    std::memcpy(to, from, bytes);
  }

 private:
  static void wait() {
    KRAIT_CHECK(!recording, "a transfer that waits cannot be recorded");
    work_until(queued);
  }
  void* do_allocate(size_t bytes, size_t alignment) override {
    KRAIT_CHECK(!recording, "memory was asked for in a recording");
    return host_memory().allocate(bytes, alignment);
  }
  void do_deallocate(void* p, size_t bytes, size_t alignment) override {
    wait();
    host_memory().deallocate(p, bytes, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

Memory& deferred_memory() {
  static DeferredMemory memory;
  return memory;
}

template <auto Op>
struct Later;
template <class... Args, void (*Engine::*Op)(Context&, const Args&...)>
struct Later<Op> {
  static void run(Context&, const Args&... args) {
    add([args...] { (cpu_engine().*Op)(executor(), args...); });
  }
};

void global_norm_later(Context&, const GlobalNorm& op) {
  add([grads = std::vector<Tensor>(op.grads.begin(), op.grads.end()), norm = op.norm] {
    cpu_engine().global_norm(executor(), {grads, norm});
  });
}

void clip_offsets_later(Context&, const Tensor& offsets, int64_t begin, int64_t end,
                        const Tensor& clipped) {
  add([=] { cpu_engine().clip_offsets(executor(), offsets, begin, end, clipped); });
}

std::shared_ptr<void> record(Context&, const std::function<void()>& body) {
  auto made = std::make_shared<Recording>();
  recording = made.get();
  body();
  recording = nullptr;
  return made;
}

void replay(Context&, const std::shared_ptr<void>& made) {
  ++replays;
  for (const Work& work : *static_cast<Recording*>(made.get())) add(work);
}

Engine make_engine() {
  Engine e = cpu_engine();
  e.name = "deferred";
  e.memory = deferred_memory;
  e.synchronize = [](Context&) { work_until(queued); };
  e.mark = [](Context&, std::shared_ptr<void>& mark) { mark = std::make_shared<int64_t>(queued); };
  e.wait = [](Context&, const std::shared_ptr<void>& mark) {
    if (mark) work_until(*static_cast<int64_t*>(mark.get()));
  };
  e.record = record;
  e.replay = replay;
  e.embedding_fwd = Later<&Engine::embedding_fwd>::run;
  e.embedding_bwd = Later<&Engine::embedding_bwd>::run;
  e.rms_norm_fwd = Later<&Engine::rms_norm_fwd>::run;
  e.rms_norm_bwd = Later<&Engine::rms_norm_bwd>::run;
  e.linear_fwd = Later<&Engine::linear_fwd>::run;
  e.linear_bwd = Later<&Engine::linear_bwd>::run;
  e.causal_conv1d_fwd = Later<&Engine::causal_conv1d_fwd>::run;
  e.causal_conv1d_bwd = Later<&Engine::causal_conv1d_bwd>::run;
  e.causal_conv1d_step = Later<&Engine::causal_conv1d_step>::run;
  e.selective_scan_fwd = Later<&Engine::selective_scan_fwd>::run;
  e.selective_scan_bwd = Later<&Engine::selective_scan_bwd>::run;
  e.selective_scan_step = Later<&Engine::selective_scan_step>::run;
  e.cross_entropy_fwd = Later<&Engine::cross_entropy_fwd>::run;
  e.cross_entropy_bwd = Later<&Engine::cross_entropy_bwd>::run;
  e.adamw = Later<&Engine::adamw>::run;
  e.global_norm = global_norm_later;
  e.fill_zero = Later<&Engine::fill_zero>::run;
  e.copy_elements = Later<&Engine::copy_elements>::run;
  e.round_elements = Later<&Engine::round_elements>::run;
  e.negative_exp = Later<&Engine::negative_exp>::run;
  e.add_product = Later<&Engine::add_product>::run;
  e.sum_elements = Later<&Engine::sum_elements>::run;
  e.clip_offsets = clip_offsets_later;
  e.sample_tokens = Later<&Engine::sample_tokens>::run;
  return e;
}

}  // namespace

const Engine& deferred_engine() {
  static const Engine engine = make_engine();
  return engine;
}

int64_t deferred_replays() { return replays; }

}  // namespace krait::op_test
