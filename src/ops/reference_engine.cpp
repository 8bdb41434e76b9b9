#include "ops/engine_table.h"

namespace krait {

const Engine& reference_engine() {
  static const Engine engine = KRAIT_ENGINE_TABLE(reference);
  return engine;
}

}  // namespace krait
