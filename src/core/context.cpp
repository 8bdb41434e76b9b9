#include "core/context.h"

#include <sched.h>

#include <algorithm>

#include "core/threads.h"

namespace krait {

int available_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

Context::Context(const Engine& engine, int threads)
    : engine_(&engine), threads_(threads > 0 ? threads : available_cores()) {}

}  // namespace krait
