// Steps of many sequences at once: kernels of their own on a GPU.
#include "ops/causal_conv1d.h"
#include "ops/linear.h"
#include "ops/op_test.h"
#include "ops/selective_scan.h"
#include "ops/selective_scan_step_test.h"

namespace krait {
namespace {

using op_test::bitwise_equal;
using op_test::close;
using op_test::TestTensor;
using step_test::eighths;
using step_test::Step;
using Case = step_test::StepCase;

// Around the groups of sequences (8, 16, 32), the channels (32, 64) and the rank's steps (16) of
// the GPU's kernel with the product inside, many for its form of one block a multiprocessor (on 132
// of them: up to 128 sequences, and more, whole and half groups of terms, fewer channels in the
// last block), and shapes that it does not take.
const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {.num_seqs = 1, .d_inner = 32, .dt_rank = 16},
      {.num_seqs = 7, .d_inner = 64, .dt_rank = 48},
      {.num_seqs = 9, .d_inner = 96, .dt_rank = 128, .z = false},
      {.num_seqs = 33, .d_inner = 160, .dt_rank = 256, .D = false},
      {.num_seqs = 70, .d_inner = 1024, .dt_rank = 64, .dt_bias = false},
      {.num_seqs = 257, .d_inner = 544, .dt_rank = 96},
      {.num_seqs = 257, .d_inner = 544, .dt_rank = 48},
      {.num_seqs = 300, .d_inner = 2048, .dt_rank = 64},
      {.num_seqs = 100, .d_inner = 4096, .dt_rank = 256},
      {.num_seqs = 150, .d_inner = 4160, .dt_rank = 48, .z = false, .D = false, .dt_bias = false},
      {.num_seqs = 5, .d_inner = 40, .dt_rank = 16},
      {.num_seqs = 5, .d_inner = 64, .dt_rank = 20},
      {.num_seqs = 5, .d_inner = 64, .dt_rank = 16, .d_state = 8},
  };
  return all;
}

// The product by itself, then the step: the same bits, for dt's sums are exact.
void expect_composition(Context& ctx, const Case& c, DType type, DType states, bool settled) {
  Step whole(c, type, states), parts(c, type, states);
  whole.op.settled = settled;
  selective_scan_step(ctx, whole.op);
  const TestTensor dt(type, {c.num_seqs, c.d_inner});
  linear_fwd(ctx, {.x = parts.op.dt, .weight = parts.dt_proj, .bias = {}, .y = dt});
  parts.op.dt = dt;
  parts.op.dt_proj = {};
  selective_scan_step(ctx, parts.op);
  EXPECT_EQ(whole.y.to_double(), parts.y.to_double()) << c << " " << name_of(type);
  EXPECT_EQ(whole.state.to_double(), parts.state.to_double()) << c << " " << name_of(type);
  EXPECT_TRUE(whole.guards_intact());
}

// most: channels of all sequences together. Large cases only in bf16, whose kernel they are for,
// and once for each type of states.
void expect_compositions(Context& ctx, std::initializer_list<DType> types, int64_t most) {
  for (const Case& c : cases())
    for (const DType type : types) {
      const int64_t size = c.num_seqs * c.d_inner;
      const bool large = size > 1 << 17;
      if (size > most || (large && type != DType::bf16)) continue;
      for (const bool settled : {false, true})
        for (const DType states : {type == DType::f64 ? DType::f64 : DType::f32, DType::bf16})
          if (!large || settled == (states != DType::bf16))
            expect_composition(ctx, c, type, states, settled);
    }
}

TEST(ScanStep, WithItsProductIsTheComposition) {
  Context reference(reference_engine(), 1), cpu(cpu_engine(), 2);
  expect_compositions(reference, {DType::f64}, 1 << 10);
  expect_compositions(cpu, {DType::f32, DType::bf16}, 1 << 13);
}

TEST(ScanStepCuda, WithItsProductIsTheComposition) {
  op_test::on_cuda([](Context& ctx) {
    expect_compositions(ctx, {DType::f32, DType::bf16}, 1 << 20);
  });
}

TEST(ScanStepCuda, MatchesTheReference) {
  op_test::on_cuda([](Context& ctx) {
    Context reference(reference_engine(), 1);
    for (const Case& c : {Case{.num_seqs = 70, .d_inner = 1024, .dt_rank = 64},
                          Case{.num_seqs = 150, .d_inner = 4160, .dt_rank = 80}}) {
      Step actual(c, DType::bf16), expected(c, DType::bf16);
      selective_scan_step(ctx, actual.op);
      selective_scan_step(reference, expected.op);
      EXPECT_TRUE(close(actual.state, expected.state.to_double(), 3e-6)) << c;
      EXPECT_TRUE(close(actual.y, expected.y.to_double(), 1e-3)) << c;  // roundings that differ
    }
  });
}

TEST(ScanStepCuda, StatesInBf16AreRoundedOnce) {
  op_test::on_cuda([](Context& ctx) {
    Context reference(reference_engine(), 1);
    // With the product inside, few and many sequences to a block, one block a multiprocessor; the
    // product by itself.
    for (const Case& c : {Case{.num_seqs = 5, .d_inner = 1024, .dt_rank = 64},
                          Case{.num_seqs = 70, .d_inner = 5120, .dt_rank = 64},
                          Case{.num_seqs = 150, .d_inner = 4160, .dt_rank = 64},
                          Case{.num_seqs = 70, .d_inner = 1000, .dt_rank = 64}}) {
      Step actual(c, DType::bf16, DType::bf16), expected(c, DType::bf16);
      expected.state.values(actual.initial);
      selective_scan_step(ctx, actual.op);
      selective_scan_step(reference, expected.op);
      EXPECT_TRUE(op_test::close_bf16(actual.state, expected.state.to_double()));
      EXPECT_TRUE(close(actual.y, expected.y.to_double(), 1e-3));
      EXPECT_TRUE(actual.guards_intact());
    }
  });
}

// Some of the sequences alone, with their slots.
void expect_own_bits(Context& ctx, const Case& c) {
  Step all(c, DType::bf16), some(c, DType::bf16);
  for (Step* s : {&all, &some}) s->make_inexact();
  selective_scan_step(ctx, all.op);
  for (Tensor* t :
       {&some.op.u, &some.op.dt, &some.op.B, &some.op.C, &some.op.z, &some.op.slot, &some.op.y})
    *t = t->slice(0, 21, 34);
  selective_scan_step(ctx, some.op);
  EXPECT_EQ(op_test::to_double(some.op.y), op_test::to_double(all.op.y.slice(0, 21, 34)));
  const std::vector<double> a = all.state.to_double(), b = some.state.to_double();
  const size_t row = static_cast<size_t>(c.d_inner * c.d_state);
  for (int64_t s = 0; s < c.num_seqs; ++s) {
    const size_t at = static_cast<size_t>(all.slots - 2 - 2 * s) * row;
    const std::vector<double>& from = s >= 21 && s < 34 ? a : some.initial;
    EXPECT_TRUE(std::equal(b.begin() + static_cast<long>(at),
                           b.begin() + static_cast<long>(at + row),
                           from.begin() + static_cast<long>(at)))
        << s;
  }
}

TEST(ScanStepCuda, ASequencesBitsDoNotDependOnTheOthers) {
  op_test::on_cuda([](Context& ctx) {
    // Blocks of as many sequences; of eight or one of a multiprocessor where some are of four.
    for (const Case& c : {Case{.num_seqs = 70, .d_inner = 1024, .dt_rank = 64},
                          Case{.num_seqs = 257, .d_inner = 544, .dt_rank = 80},
                          Case{.num_seqs = 150, .d_inner = 4160, .dt_rank = 80}})
      expect_own_bits(ctx, c);
  });
}

struct Rows {
  int64_t rows, in, out;
};

// Tens of rows, few outputs, many inputs.
TEST(LinearCuda, SkinnyProductsAreExactWhereSumsAre) {
  op_test::on_cuda([](Context& ctx) {
    Context reference(reference_engine(), 1);
    for (const Rows& s : {Rows{9, 1024, 8}, Rows{33, 1536, 80}, Rows{70, 4096, 160},
                          Rows{128, 2080, 96}, Rows{256, 5120, 192}, Rows{31, 8192, 288}}) {
      for (const bool settled : {false, true}) {
        Rng rng(3);
        TestTensor x(DType::bf16, {s.rows, s.in}, s.in + 8), weight(DType::bf16, {s.out, s.in});
        eighths(x, rng, 8);
        eighths(weight, rng, 5);
        const TestTensor y(DType::bf16, {s.rows, s.out}, s.out + 3),
            expected(DType::bf16, {s.rows, s.out}, s.out + 3);
        Linear op = {.x = x, .weight = weight, .bias = {}, .y = y};
        op.settled = settled;
        linear_fwd(ctx, op);
        op.y = expected;
        linear_fwd(reference, op);
        EXPECT_EQ(y.to_double(), expected.to_double()) << s.rows << " " << s.in << " " << s.out;
        EXPECT_TRUE(y.guards_intact());
      }
    }
  });
}

TEST(LinearCuda, SkinnyProductsHaveTheBitsOfTheirRow) {
  op_test::on_cuda([](Context& ctx) {
    Rng rng(3);
    TestTensor x(DType::bf16, {128, 4096}), weight(DType::bf16, {160, 4096});
    x.normal(rng), weight.normal(rng, 0.02);
    const TestTensor all(DType::bf16, {128, 160}), some(DType::bf16, {41, 160});
    linear_fwd(ctx, {.x = x, .weight = weight, .bias = {}, .y = all});
    linear_fwd(ctx, {.x = x.view().slice(0, 50, 91), .weight = weight, .bias = {}, .y = some});
    EXPECT_EQ(some.to_double(), op_test::to_double(all.view().slice(0, 50, 91)));
  });
}

// Groups of four sequences to a thread, and one; vectors of channels, and none.
TEST(CausalConv1dCuda, AStepIsAPassOfOneToken) {
  op_test::on_cuda([](Context& ctx) {
    for (const auto& [num_seqs, d_inner, d_conv] :
         {std::array<int64_t, 3>{301, 2048, 4}, {301, 2048, 3}, {1301, 21, 2}, {3, 264, 4}}) {
      for (const auto& [type, states] : {std::pair(DType::f32, DType::f32),
                                         {DType::bf16, DType::f32},
                                         {DType::f32, DType::bf16},
                                         {DType::bf16, DType::bf16}}) {
        Rng rng(8);
        TestTensor x(type, {num_seqs, d_inner}, 2 * d_inner), weight(DType::f32, {d_inner, d_conv}),
            bias(DType::f32, {d_inner}), state(states, {num_seqs, d_conv - 1, d_inner});
        for (TestTensor* t : {&x, &weight, &bias, &state}) t->normal(rng);
        TestTensor seq_start(DType::i32, {num_seqs + 1}), slot(DType::i32, {num_seqs});
        std::vector<double> starts, slots;
        for (int64_t s = 0; s <= num_seqs; ++s) starts.push_back(static_cast<double>(s));
        for (int64_t s = 0; s < num_seqs; ++s)
          slots.push_back(static_cast<double>(num_seqs - 1 - s));
        seq_start.values(starts), slot.values(slots);
        const std::vector<double> initial = state.to_double();
        const TestTensor y(type, {num_seqs, d_inner}), stepped(type, {num_seqs, d_inner});
        CausalConv1d op = {.x = x,
                           .weight = weight,
                           .bias = bias,
                           .seq_start = seq_start,
                           .state = state,
                           .slot = slot,
                           .y = y};
        causal_conv1d_fwd(ctx, op);
        const std::vector<double> after = state.to_double();
        op.seq_start = {}, op.y = stepped;
        for (const bool settled : {false, true}) {
          state.values(initial);
          op.settled = settled;
          causal_conv1d_step(ctx, op);
          EXPECT_TRUE(bitwise_equal(stepped, y)) << num_seqs << " " << d_inner;
          EXPECT_EQ(state.to_double(), after) << num_seqs << " " << d_inner;
        }
      }
    }
  });
}

}  // namespace
}  // namespace krait
