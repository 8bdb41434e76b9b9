// For tests, on any machine: an engine that is as asynchronous as a GPU's. Its memory is not the
// host's, its ops are queued and done only as far as somebody waits, in order, and it records and
// replays. The ops are the CPU engine's, and so are their bits.
#pragma once

#include "ops/engine.h"

namespace krait::op_test {

const Engine& deferred_engine();
int64_t deferred_replays();  // so far

}  // namespace krait::op_test
