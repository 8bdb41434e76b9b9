#include "ops/engine_table.h"
#include "ops/selective_scan_cpu.h"

namespace krait {

const Engine& cpu_engine() {
  static const Engine engine = KRAIT_ENGINE_TABLE(
      cpu, .memory = host_memory, .transfer_memory = host_memory, .scan_chunk = cpu::kScanChunk,
      .synchronize = [](Context&) {}, .record = nullptr, .replay = nullptr);
  return engine;
}

}  // namespace krait
