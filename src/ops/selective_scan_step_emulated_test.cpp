// The kernel of the scan's step with dt_proj, its source as it is, on the CPU
// (emulated/emulator.h): both of its forms compute the step, and give the same bits.
#include "cuda_words.h"

// Behind the words that they use.
#include <gtest/gtest.h>

#include "ops/engine.h"
#include "ops/op_test.h"
#include "ops/selective_scan.h"
#include "ops/selective_scan_step_projected.cuh"

namespace krait::cuda {
namespace {

using namespace scan_step;
using op_test::close;
using op_test::TestTensor;

struct Shape {
  int64_t num_seqs, d_inner, dt_rank;
  bool z = true, D = true, dt_bias = true, slots = true;
};

// Slots run backwards, with others between them.
struct Step {
  Shape shape;
  TestTensor u, x_dbl, dt_proj, A, D, dt_bias, z, slot, state, y;

  Step(const Shape& s, DType states)
      : shape(s),
        u(DType::bf16, {s.num_seqs, s.d_inner}),
        x_dbl(DType::bf16, {s.num_seqs, s.dt_rank + 2 * kStates}),
        dt_proj(DType::bf16, {s.d_inner, s.dt_rank}),
        A(DType::f32, {s.d_inner, kStates}),
        D(DType::f32, {s.d_inner}),
        dt_bias(DType::f32, {s.d_inner}),
        z(DType::bf16, {s.num_seqs, s.d_inner}, 2 * s.d_inner),
        slot(DType::i32, {s.num_seqs}),
        state(states, {2 * s.num_seqs, s.d_inner, kStates}),
        y(DType::bf16, {s.num_seqs, s.d_inner}, 2 * s.d_inner) {
    Rng rng(1);
    for (TestTensor* t : {&u, &x_dbl, &D, &z, &state}) t->normal(rng);
    dt_proj.normal(rng, 0.2);
    A.uniform(rng, -8, -0.2);
    dt_bias.uniform(rng, -5, -1);
    std::vector<double> places;
    for (int64_t i = 0; i < s.num_seqs; ++i)
      places.push_back(static_cast<double>(s.slots ? 2 * s.num_seqs - 1 - 2 * i : i));
    slot.values(places);
  }

  SelectiveScan op() const {
    const int64_t r = shape.dt_rank;
    const Tensor rows = x_dbl;
    const auto per_token = [&](int64_t begin) {
      return one_group(rows.slice(1, begin, begin + kStates));
    };
    return {.u = u,
            .dt = rows.slice(1, 0, r),
            .A = A,
            .B = per_token(r),
            .C = per_token(r + kStates),
            .D = shape.D ? D.view() : Tensor(),
            .dt_bias = shape.dt_bias ? dt_bias.view() : Tensor(),
            .z = shape.z ? z.view() : Tensor(),
            .seq_start = {},
            .state = state,
            .slot = shape.slots ? slot.view() : Tensor(),
            .y = y,
            .saved = {},
            .dt_proj = dt_proj};
  }

  template <class S, int kSequences, int kBlocks>
  void run() const {
    const Args a = arguments(op());
    for (int c = 0; c < a.d_inner / kChannels<S>; ++c)
      for (int s = 0; s * kSequences < a.num_seqs; ++s)
        emulated::run({.index = 0,
                       .blocks = 1,
                       .threads = kThreads,
                       .shared_bytes = shared_bytes<S, kSequences, kBlocks>(a.dt_rank)},
                      emulated::Copies::at_once, 1, [&](char* memory) {
                        scan_step::run<S, kSequences, kBlocks>(
                            a, reinterpret_cast<unsigned char*>(memory), c, s);
                      });
    EXPECT_TRUE(y.guards_intact());
    EXPECT_TRUE(state.guards_intact());
  }
};

// Around groups of sequences, both counts of channels, whole and half groups of dt's terms.
const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
      {.num_seqs = 41, .d_inner = 64, .dt_rank = 48},
      {.num_seqs = 3, .d_inner = 128, .dt_rank = 256, .z = false},
      {.num_seqs = 32, .d_inner = 64, .dt_rank = 128, .D = false, .slots = false},
      {.num_seqs = 9, .d_inner = 64, .dt_rank = 16, .dt_bias = false},
  };
  return all;
}

template <class S, int kMany>
void expect_step(DType states) {
  Context reference(reference_engine(), 1);
  for (const Shape& s : shapes()) {
    SCOPED_TRACE(testing::Message() << s.num_seqs << " x " << s.d_inner << ", " << s.dt_rank);
    // The engine's own states are f32, from the same values.
    Step expected(s, DType::f32);
    const Step few(s, states), many(s, states);
    expected.state.values(few.state.to_double());
    krait::selective_scan_step(reference, expected.op());
    few.run<S, kProjectedFewSequences, 4>();
    many.run<S, kMany, 4>();
    EXPECT_TRUE(close(few.y, expected.y.to_double(), 2e-3));  // roundings to bf16 that differ
    EXPECT_TRUE(close(few.state, expected.state.to_double(), states == DType::f32 ? 3e-4 : 3e-3));
    EXPECT_EQ(many.y.to_double(), few.y.to_double());
    EXPECT_EQ(many.state.to_double(), few.state.to_double());
    if constexpr (sizeof(S) == 4) {
      const Step eight(s, states), eight_few(s, states);
      eight.run<S, kMany, 8>();
      eight_few.run<S, kProjectedFewSequences, 8>();
      for (const Step* other : {&eight, &eight_few}) {
        EXPECT_EQ(other->y.to_double(), few.y.to_double());
        EXPECT_EQ(other->state.to_double(), few.state.to_double());
      }
    }
  }
}

TEST(ScanStepEmulated, ComputesTheStepInEveryForm) { expect_step<float, 32>(DType::f32); }
TEST(ScanStepEmulated, ComputesTheStepInEveryFormOnBf16States) {
  expect_step<bf16, 16>(DType::bf16);
}

}  // namespace
}  // namespace krait::cuda
