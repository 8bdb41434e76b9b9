#include "ops/engine_table.h"
#include "ops/selective_scan_cpu.h"

namespace krait {

const Engine& cpu_engine() {
  static const Engine engine = KRAIT_ENGINE_TABLE(
      cpu, .memory = host_memory, .transfer_memory = host_memory, .scan_chunk = cpu::kScanChunk,
      .synchronize = [](Context&) {}, .mark = [](Context&, std::shared_ptr<void>&) {},
      .wait = [](Context&, const std::shared_ptr<void>&) {}, .record = nullptr, .replay = nullptr,
      .read_bandwidth = cpu::read_bandwidth, .exp_rate = cpu::exp_rate);
  return engine;
}

}  // namespace krait
