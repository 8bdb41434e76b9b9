#include "ops/selective_scan_test.h"

namespace krait {
namespace {

using namespace scan_test;

TEST(SelectiveScan, ReferenceGradientsMatchFiniteDifferences) {
  Context ctx(reference_engine());
  for (const Case& c : cases()) {
    if (Scan::total(c) > 80 || c.strided || c.d_inner > 24)
      continue;  // the rest differs in layout only
    SCOPED_TRACE(::testing::PrintToString(c));
    Scan scan(c, DType::f64);
    const auto objective = [&] {
      scan.forward(ctx);
      double sum = 0;
      const std::vector<double> y = scan.y.to_double(), dy = scan.dy.to_double(),
                                state = scan.state.to_double();
      for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
      for (size_t i = 0; i < state.size() && c.state; ++i) sum += state[i] * scan.dfinal[i];
      return sum;
    };
    for (TestTensor* sum : {&scan.dA, &scan.dD, &scan.ddt_bias}) sum->zero();
    if (scan.tokens > 0)
      scan.backward(ctx);
    else
      continue;
    Rng rng(3);
    const auto check = [&](const char* name, const TestTensor& input, const TestTensor& gradient) {
      EXPECT_TRUE(op_test::gradient_matches(input, gradient.to_double(), objective, rng)) << name;
    };
    check("u", scan.u, scan.du);
    check("dt", scan.dt, scan.ddt);
    check("A", scan.A, scan.dA);
    check("B, C", scan.bc, scan.dbc);
    if (c.D) check("D", scan.D, scan.dD);
    if (c.dt_bias) check("dt_bias", scan.dt_bias, scan.ddt_bias);
    if (c.z) check("z", scan.z, scan.dz);
    if (c.state) {
      TestTensor start(DType::f64, {scan.slots, c.d_inner, c.d_state});
      start.values(scan.initial);
      const auto from_start = [&] {
        scan.initial = start.to_double();
        return objective();
      };
      EXPECT_TRUE(op_test::gradient_matches(start, scan.dstate.to_double(), from_start, rng))
          << "state";
    }
  }
}

TEST(SelectiveScan, CpuMatchesTheReferenceOnEverySimdTarget) {
  op_test::for_each_simd_target([] {
    Context cpu(cpu_engine(), 2);
    for (const Case& c : cases())
      for (DType type : {DType::f32, DType::bf16}) {
        SCOPED_TRACE(::testing::PrintToString(c) + " " + name_of(type));
        expect_forward_like_reference(cpu, kCpu, c, type);
        expect_backward_like_reference(cpu, kCpu, c, type, true);
        expect_backward_like_reference(cpu, kCpu, c, type, false);
        expect_gradients_in_place(cpu, c, type);
      }
  });
}

// One long sequence: the error does not grow with length.
TEST(SelectiveScan, LongSequencesKeepTheTolerance) {
  Context cpu(cpu_engine(), 2);
  const Case c = {.lengths = {20001}, .d_inner = 8, .d_state = 16};
  expect_forward_like_reference(cpu, kCpu, c, DType::f32);
  expect_backward_like_reference(cpu, kCpu, c, DType::f32, true);
}

TEST(SelectiveScan, SplitAnywhereAndCarryTheState) {
  Context cpu(cpu_engine(), 1);
  expect_split_is_whole(cpu, kCpu, {.lengths = {70}, .d_inner = 20, .d_state = 16},
                        {1, 31, 32, 33, 64, 69});
}

TEST(SelectiveScan, StepByStepIsTheWholePass) {
  op_test::for_each_simd_target([] {
    Context cpu(cpu_engine(), 2);
    expect_steps_are_the_pass(cpu, kCpu);
  });
}

TEST(SelectiveScan, StatesInBf16AreRoundedOnce) {
  Context reference(reference_engine(), 1);
  expect_states_in_bf16(reference, kCpu, {&cases()});
  op_test::for_each_simd_target([] {
    Context cpu(cpu_engine(), 2);
    expect_states_in_bf16(cpu, kCpu, {&cases()});
  });
}

TEST(SelectiveScan, PackedIsSeparateBitForBit) {
  Context two(cpu_engine(), 2), one(cpu_engine(), 1);
  expect_packed_is_separate(two, one, {.lengths = {33, 50, 7}, .d_inner = 40, .d_state = 16});
}

TEST(SelectiveScan, SameBitsTwiceAndForAnyNumberOfThreads) {
  Context one(cpu_engine(), 1), two(cpu_engine(), 2);
  expect_same_bits(
      one, two,
      {.lengths = {100, 61, 3, 40, 41, 42, 43, 44, 45, 46}, .d_inner = 300, .d_state = 16});
}

TEST(SelectiveScan, RowsMayRepeat) {
  Context cpu(cpu_engine(), 2);
  expect_rows_may_repeat(cpu);
}

TEST(SelectiveScan, SlowModesReachTheirGain) {
  op_test::for_each_simd_target([] {
    Context cpu(cpu_engine(), 2);
    for (double rate : kSlowRates) expect_gain(cpu, kCpu, rate, 20480);
  });
}

TEST(SelectiveScan, ExtremesStayFinite) {
  op_test::for_each_simd_target([] {
    Context cpu(cpu_engine(), 2);
    expect_extremes_stay_finite(cpu);
  });
}

TEST(SelectiveScan, WrongArgumentsAreRefused) {
  Context cpu(cpu_engine(), 1);
  const Case c = {.lengths = {3, 4}, .d_inner = 4, .d_state = 16};
  Scan scan(c, DType::f32);
  const auto refused = [&](auto change) {
    SelectiveScan op = scan.op;
    change(op);
    EXPECT_THROW(selective_scan_fwd(cpu, op), CheckFailure);
  };
  TestTensor other(DType::f32, {7, 5}), starts(DType::i32, {3}), slots(DType::i32, {2});
  refused([&](SelectiveScan& op) { op.dt = other; });
  refused([&](SelectiveScan& op) { op.y = Tensor(); });
  refused([&](SelectiveScan& op) { op.z.dtype = DType::bf16; });
  refused([&](SelectiveScan& op) { starts.values({0, 3, 6}), op.seq_start = starts; });
  refused([&](SelectiveScan& op) { starts.values({0, 8, 7}), op.seq_start = starts; });
  refused([&](SelectiveScan& op) { slots.values({1, 1}), op.slot = slots; });
  refused([&](SelectiveScan& op) { slots.values({0, 4}), op.slot = slots; });
  refused([&](SelectiveScan& op) { op.state.dtype = DType::f16; });
  Scan in_bf16(c, DType::f32, DType::bf16);
  EXPECT_THROW(in_bf16.backward(cpu), CheckFailure);
}

}  // namespace
}  // namespace krait
