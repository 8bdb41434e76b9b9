#include "ops/machine.h"

#include "ops/op_test.h"

namespace krait::op_test {
namespace {

// Any machine that runs the tests lies within these; a unit forgotten does not.
TEST(Machine, RatesArePlausible) {
  Engine engine = reference_engine();
  engine.linear_fwd = cpu::linear_fwd;
  Context ctx(engine, 1);
  const double read = measure_read_bandwidth(ctx), gemm = measure_gemm_rate(ctx, DType::f32);
  EXPECT_TRUE(read > 0.1 && read < 1e4) << read;
  EXPECT_TRUE(gemm > 0.1 && gemm < 1e5) << gemm;
}

}  // namespace
}  // namespace krait::op_test
