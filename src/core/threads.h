// Parallel loops of the CPU engine. An exception in the body would end the program (it must not
// cross a thread), so bodies do not throw.
#pragma once

#include <cstdint>

namespace krait {

int available_cores();  // cores this process may run on; at least 1

// body(i) for i in [0, count), each index once, on up to `threads` threads. Which thread runs an
// index has no influence on results as long as bodies write to places of their own.
template <class F>
void parallel_for(int threads, int64_t count, F&& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) body(i);
}

// The same with contiguous ranges: body(begin, end) for one range per thread, cut at multiples of
// `grain`.
template <class F>
void parallel_ranges(int threads, int64_t count, int64_t grain, F&& body) {
  const int64_t pieces = (count + grain - 1) / grain;
  const int64_t parts = pieces < threads ? pieces : threads;
  parallel_for(threads, parts, [&](int64_t part) {
    const int64_t begin = pieces * part / parts * grain, end = pieces * (part + 1) / parts * grain;
    body(begin, end < count ? end : count);
  });
}

}  // namespace krait
