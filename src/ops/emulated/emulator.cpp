#include "ops/emulated/emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

EmulatedIndex threadIdx, blockIdx;

namespace krait::emulated {
namespace {

constexpr size_t kStackBytes = 64 << 10;

struct Thread {
  ucontext_t context;
  int block, number;  // in the cluster, in the block
  bool done = false;
  int cluster_turn = 0;  // at which it arrived
};

// Where threads wait for something to change; they look again whether it is what they wait for.
using Waiters = std::vector<Thread*>;

struct Meeting {
  int arrived = 0, turn = 0;
  Waiters waiters;
};

struct PhaseBarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  Waiters waiters;
};

struct Block {
  std::vector<char> memory;
  std::map<uint32_t, PhaseBarrier> barriers;
  std::map<int, Meeting> meetings;
  std::vector<Meeting> warps;
  std::vector<uint32_t> exchanged;
  std::vector<std::array<uint32_t, 6>> shown;
};

struct Copy {
  int block;
  uint32_t to, barrier;
  int bytes;
  std::function<void(char*)> copy;
};

struct Machine {
  Cluster cluster{};
  Copies when{};
  std::mt19937_64 random;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  Meeting cluster_meeting;
  std::deque<Thread*> ready;
  std::deque<Copy> copies;
  Thread* running = nullptr;
  ucontext_t scheduler{};
  const std::function<void(char*)>* body = nullptr;
  std::string failure;
};

Machine* machine = nullptr;  // of the run in progress

Block& block() { return machine->blocks[static_cast<size_t>(machine->running->block)]; }

void to_scheduler() { swapcontext(&machine->running->context, &machine->scheduler); }

void wait_among(Waiters& waiters) {
  waiters.push_back(machine->running);
  to_scheduler();
}

void wake(Waiters& waiters) {
  for (Thread* t : waiters) machine->ready.push_back(t);
  waiters.clear();
}

// The last of `count` to arrive wakes the others.
void meet(Meeting& m, int count) {
  const int turn = m.turn;
  if (++m.arrived == count) {
    m.arrived = 0;
    ++m.turn;
    wake(m.waiters);
  }
  while (m.turn == turn) wait_among(m.waiters);
}

char* memory_at(Block& of, uint32_t address, int bytes) {
  if (address < kSharedStart ||
      address - kSharedStart + static_cast<size_t>(bytes) > of.memory.size())
    return nullptr;
  return of.memory.data() + (address - kSharedStart);
}

// One that was initialized: a copy to another must not end, a thread not wait there.
PhaseBarrier& barrier_at(Block& of, uint32_t address) {
  const auto found = of.barriers.find(address);
  if (found != of.barriers.end()) return found->second;
  if (machine->running) fail("a barrier that was not initialized");
  throw std::runtime_error("a copy's barrier that was not initialized");
}

void end_phase_if_over(PhaseBarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.count;
  wake(b.waiters);
}

void do_copy(size_t i) {
  Copy c = std::move(machine->copies[i]);
  machine->copies.erase(machine->copies.begin() + static_cast<std::ptrdiff_t>(i));
  Block& to = machine->blocks[static_cast<size_t>(c.block)];
  if (c.copy) c.copy(memory_at(to, c.to, c.bytes));
  PhaseBarrier& b = barrier_at(to, c.barrier);
  b.bytes -= c.bytes;
  if (!c.copy && --b.pending < 0)
    throw std::runtime_error("more arrivals from afar than a barrier counts");
  end_phase_if_over(b);
}

void thread_main() {
  (*machine->body)(block().memory.data());
  machine->running->done = true;
  to_scheduler();
}

void resume(Thread* t) {
  machine->running = t;
  threadIdx.x = static_cast<unsigned>(t->number);
  blockIdx.x = static_cast<unsigned>(machine->cluster.index * machine->cluster.blocks + t->block);
  swapcontext(&machine->scheduler, &t->context);
  machine->running = nullptr;
  if (!machine->failure.empty()) throw std::runtime_error(machine->failure);
}

size_t any(size_t count) { return static_cast<size_t>(machine->random() % count); }

// Threads as long as there are any that can go on, then a copy.
void schedule() {
  Machine& m = *machine;
  while (!m.ready.empty() || !m.copies.empty()) {
    const bool copy_early = m.when == Copies::random && !m.copies.empty() && any(64) == 0;
    if (m.ready.empty() || copy_early) {
      do_copy(m.when == Copies::random ? any(m.copies.size()) : m.copies.size() - 1);
      continue;
    }
    const size_t i = m.when == Copies::random ? any(std::min<size_t>(m.ready.size(), 8)) : 0;
    Thread* const t = m.ready[i];
    m.ready.erase(m.ready.begin() + static_cast<std::ptrdiff_t>(i));
    resume(t);
  }
  for (const auto& t : m.threads)
    if (!t->done) throw std::runtime_error("deadlock");
}

class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kStackBytes) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Stacks() { munmap(memory_, bytes_); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  void* operator[](size_t i) const { return static_cast<char*>(memory_) + i * kStackBytes; }

 private:
  size_t bytes_;
  void* memory_;
};

void prepare(ucontext_t& context, void* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, thread_main, 0);
}

void make_threads(Machine& m, const Stacks& stacks) {
  for (int b = 0; b < m.cluster.blocks; ++b) {
    Block& block = m.blocks[static_cast<size_t>(b)];
    // No number: what is read before it is written shows.
    block.memory.assign(m.cluster.shared_bytes, static_cast<char>(0xff));
    block.warps.resize(static_cast<size_t>(m.cluster.threads / 32));
    block.exchanged.resize(static_cast<size_t>(m.cluster.threads));
    block.shown.resize(static_cast<size_t>(m.cluster.threads));
    for (int t = 0; t < m.cluster.threads; ++t) {
      auto thread = std::make_unique<Thread>();
      thread->block = b;
      thread->number = t;
      prepare(thread->context, stacks[m.threads.size()]);
      m.ready.push_back(thread.get());
      m.threads.push_back(std::move(thread));
    }
  }
}

}  // namespace

void run(const Cluster& cluster, Copies when, uint64_t seed,
         const std::function<void(char*)>& body) {
  const Stacks stacks(static_cast<size_t>(cluster.blocks * cluster.threads));
  Machine m;
  m.cluster = cluster;
  m.when = when;
  m.random.seed(seed);
  m.body = &body;
  m.blocks.resize(static_cast<size_t>(cluster.blocks));
  machine = &m;
  try {
    make_threads(m, stacks);
    schedule();
  } catch (...) {
    machine = nullptr;
    throw;
  }
  machine = nullptr;
}

void fail(const char* what) {
  machine->failure = what;
  for (;;) to_scheduler();
}

uint32_t address_of(const void* shared) {
  return kSharedStart +
         static_cast<uint32_t>(static_cast<const char*>(shared) - block().memory.data());
}

char* pointer_to(uint32_t address, int bytes) {
  char* const p = memory_at(block(), address, bytes);
  if (!p) fail("an address outside of shared memory");
  return p;
}

void init_barrier(uint32_t barrier, int count) {
  PhaseBarrier& b = block().barriers[barrier];
  b.count = b.pending = count;
}

void arrive_at(uint32_t barrier, int bytes) {
  PhaseBarrier& b = barrier_at(block(), barrier);
  b.bytes += bytes;
  if (--b.pending < 0) fail("more arrivals than a barrier counts");
  end_phase_if_over(b);
}

// By the phase's parity, as the instruction looks at it.
void await_phase(uint32_t barrier, uint32_t phase) {
  PhaseBarrier& b = barrier_at(block(), barrier);
  while (b.phase % 2 == phase % 2) wait_among(b.waiters);
  if (b.phase != phase + 1) fail("a phase taken for another");
}

void meet_in_warp() { meet(block().warps[static_cast<size_t>(machine->running->number / 32)], 32); }

void meet_in_block(int number, int threads) { meet(block().meetings[number], threads); }

void meet_all() { meet_in_block(0, machine->cluster.threads); }

void arrive_at_cluster() {
  Meeting& m = machine->cluster_meeting;
  machine->running->cluster_turn = m.turn;
  if (++m.arrived < machine->cluster.blocks * machine->cluster.threads) return;
  m.arrived = 0;
  ++m.turn;
  wake(m.waiters);
}

void await_cluster() {
  Meeting& m = machine->cluster_meeting;
  while (m.turn == machine->running->cluster_turn) wait_among(m.waiters);
}

uint32_t from_lane(uint32_t value, int lane) {
  const int thread = machine->running->number;
  block().exchanged[static_cast<size_t>(thread)] = value;
  meet_in_warp();
  const uint32_t other = block().exchanged[static_cast<size_t>(thread / 32 * 32 + lane)];
  meet_in_warp();
  return other;
}

void show(const uint32_t (&words)[6]) {
  std::ranges::copy(words, block().shown[static_cast<size_t>(machine->running->number)].begin());
  meet_in_warp();
}

uint32_t shown(int lane, int word) {
  const int thread = machine->running->number / 32 * 32 + lane;
  return block().shown[static_cast<size_t>(thread)][static_cast<size_t>(word)];
}

void start_copy(int to_block, uint32_t to, int bytes, uint32_t barrier,
                std::function<void(char*)> copy) {
  if (to_block == machine->running->block) fail("a copy of a block to itself");
  if (to_block < 0) to_block = machine->running->block;
  if (to % 16 != 0 || bytes % 16 != 0) fail("a copy that is not aligned");
  if (!memory_at(machine->blocks[static_cast<size_t>(to_block)], to, bytes))
    fail("a copy to an address outside of shared memory");
  machine->copies.push_back({to_block, to, barrier, bytes, std::move(copy)});
  if (machine->when == Copies::at_once) do_copy(machine->copies.size() - 1);
}

void start_arrival(int block, uint32_t barrier) {
  machine->copies.push_back({block, barrier, barrier, 0, nullptr});
  if (machine->when == Copies::at_once) do_copy(machine->copies.size() - 1);
}

}  // namespace krait::emulated
