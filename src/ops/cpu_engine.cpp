#include "ops/engine_table.h"

namespace krait {

const Engine& cpu_engine() {
  static const Engine engine = KRAIT_ENGINE_TABLE(cpu);
  return engine;
}

}  // namespace krait
