// Runs the source of a kernel of clusters on the CPU, where there is no GPU: every thread of a
// cluster takes turns, and bulk copies and tile copies happen when the test wants them to, as late
// as anything can be waited for, too. So what a schedule of a GPU would show once in a million
// runs shows at once: memory that is written over before a copy has read it, barriers that wait for
// ever or are a phase ahead.
//
// The kernel's headers are compiled by the host's compiler with emulated/include in front of src:
// the few headers that hold instructions (barriers, copies, products) are replaced by those there.
// What they do not emulate: the order of memory accesses within the GPU (fences are nothing here),
// divergence within warps, time.
#pragma once

#include <cstdint>
#include <functional>
#include <random>

// The running thread's place, under the names that kernels use.
struct EmulatedIndex {
  unsigned x = 0, y = 0, z = 0;
};
extern EmulatedIndex threadIdx, blockIdx;

namespace krait::emulated {

enum class Copies { at_once, late, random };

struct Cluster {
  int index, blocks, threads;
  size_t shared_bytes;  // of a block, from kSharedStart on
};

// As on a GPU dynamic shared memory does not begin at 0.
inline constexpr uint32_t kSharedStart = 4096;

// body: what a thread does, given its block's shared memory. Throws std::runtime_error for what a
// kernel must not do (access outside of shared memory, misaligned copies, a copy of a block to
// itself, too many arrivals, a phase that nobody can tell from another), and for a deadlock.
void run(const Cluster&, Copies, uint64_t seed, const std::function<void(char* memory)>& body);

// --- For the replaced headers, on behalf of the running thread ---
[[noreturn]] void fail(const char* what);
uint32_t address_of(const void* shared);
char* pointer_to(uint32_t address, int bytes);  // into the thread's block
void init_barrier(uint32_t barrier, int count);
void arrive_at(uint32_t barrier, int bytes);  // bytes: announced
void await_phase(uint32_t barrier, uint32_t phase);
void meet_in_warp();
void meet_in_block(int number, int threads);  // number: from 1 on
void meet_all();                              // threads of the block
void arrive_at_cluster();
void await_cluster();
uint32_t from_lane(uint32_t value, int lane);
// Six words of each lane, for all of the warp until it meets.
void show(const uint32_t (&words)[6]);
uint32_t shown(int lane, int word);
// A copy that will happen: `copy` writes `bytes` at `to` of a block of the cluster (-1: the
// thread's), where they arrive at a barrier.
void start_copy(int block, uint32_t to, int bytes, uint32_t barrier,
                std::function<void(char* to)> copy);
// At a barrier of a block of the cluster: on its way like a copy.
void start_arrival(int block, uint32_t barrier);

}  // namespace krait::emulated
