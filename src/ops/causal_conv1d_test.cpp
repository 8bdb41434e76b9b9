#include "ops/causal_conv1d.h"

#include <cmath>

#include "ops/op_test.h"

namespace krait {
namespace {

using op_test::close;
using op_test::close_bf16;
using op_test::TestTensor;

struct Case {
  std::vector<int> lengths;
  int64_t d_inner, d_conv = 4;
  bool bias = true, state = true, silu = true, strided = false;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << "lengths";
  for (int l : c.lengths) out << " " << l;
  return out << ", d_inner " << c.d_inner << ", d_conv " << c.d_conv << (c.bias ? "" : ", no bias")
             << (c.state ? "" : ", no state") << (c.silu ? "" : ", no silu");
}

// Around the piece (64 tokens), the lanes, the strip (256 channels); sequences shorter than the
// window.
const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {.lengths = {1}, .d_inner = 1},
      {.lengths = {2}, .d_inner = 3, .d_conv = 2},
      {.lengths = {3}, .d_inner = 4, .d_conv = 3, .bias = false},
      {.lengths = {63}, .d_inner = 7, .silu = false},
      {.lengths = {64}, .d_inner = 8, .state = false},
      {.lengths = {65}, .d_inner = 9, .strided = true},
      {.lengths = {131}, .d_inner = 15},
      {.lengths = {5, 0, 1, 2, 70, 3, 4}, .d_inner = 17},
      {.lengths = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, .d_inner = 16, .d_conv = 3},
      {.lengths = {20, 66}, .d_inner = 270, .strided = true},
  };
  return all;
}

struct Conv {
  int64_t tokens, num_seqs;
  DType full;
  TestTensor x, weight, bias, seq_start, slot, state, y, dy, dx, dweight, dbias, dstate;
  CausalConv1d op;
  CausalConv1dGrad grad;
  std::vector<double> initial, dfinal;

  static int64_t total(const Case& c) {
    int64_t n = 0;
    for (int l : c.lengths) n += l;
    return n;
  }

  Conv(const Case& c, DType type) : Conv(c, type, type == DType::f64 ? DType::f64 : DType::f32) {}

  Conv(const Case& c, DType type, DType states)
      : tokens(total(c)),
        num_seqs(static_cast<int64_t>(c.lengths.size())),
        full(type == DType::f64 ? DType::f64 : DType::f32),
        x(type, {tokens, c.d_inner}, c.strided ? 2 * c.d_inner : 0),
        weight(full, {c.d_inner, c.d_conv}),
        bias(full, {c.d_inner}),
        seq_start(DType::i32, {num_seqs + 1}),
        slot(DType::i32, {num_seqs}),
        state(states, {num_seqs + 1, c.d_conv - 1, c.d_inner}),
        y(type, {tokens, c.d_inner}, c.strided ? c.d_inner + 3 : 0),
        dy(type, {tokens, c.d_inner}),
        dx(type, {tokens, c.d_inner}, c.strided ? 2 * c.d_inner : 0),
        dweight(full, {c.d_inner, c.d_conv}),
        dbias(full, {c.d_inner}),
        dstate(full, {num_seqs + 1, c.d_conv - 1, c.d_inner}) {
    Rng rng(4);
    for (TestTensor* t : {&x, &weight, &bias, &state, &dy, &dstate, &dweight, &dbias})
      t->normal(rng);
    std::vector<double> starts = {0}, places;
    for (int l : c.lengths) starts.push_back(starts.back() + l);
    for (int64_t s = 0; s < num_seqs; ++s) places.push_back(static_cast<double>(num_seqs - s));
    seq_start.values(starts);
    slot.values(places);
    keep_initial();
    op = {.x = x,
          .weight = weight,
          .bias = c.bias ? bias.view() : Tensor(),
          .seq_start = seq_start,
          .state = c.state ? state.view() : Tensor(),
          .slot = slot,
          .y = y,
          .silu = c.silu};
    grad = {.dy = dy,
            .dx = dx,
            .dweight = dweight,
            .dbias = c.bias ? dbias.view() : Tensor(),
            .dstate = c.state ? dstate.view() : Tensor()};
  }
  void keep_initial() {
    initial = state.to_double();
    dfinal = dstate.to_double();
  }
  void take(const Conv& other) {
    for (auto [mine, theirs] : {std::pair{&x, &other.x},
                                {&weight, &other.weight},
                                {&bias, &other.bias},
                                {&state, &other.state},
                                {&dy, &other.dy},
                                {&dweight, &other.dweight},
                                {&dbias, &other.dbias},
                                {&dstate, &other.dstate}})
      mine->copy(*theirs);
    keep_initial();
  }
  void forward(Context& ctx) {
    state.values(initial);
    causal_conv1d_fwd(ctx, op);
  }
  void backward(Context& ctx) {
    state.values(initial);
    dstate.values(dfinal);
    causal_conv1d_bwd(ctx, op, grad);
  }
  bool guards_intact() const {
    for (const TestTensor* t : {&x, &weight, &state, &y, &dy, &dx, &dweight, &dbias, &dstate})
      if (!t->guards_intact()) return false;
    return true;
  }
};

TEST(CausalConv1d, ReferenceGradientsMatchFiniteDifferences) {
  Context ctx(reference_engine());
  for (const Case& c : cases()) {
    if (c.strided) continue;  // differs in layout only
    SCOPED_TRACE(::testing::PrintToString(c));
    Conv conv(c, DType::f64);
    const auto objective = [&] {
      conv.forward(ctx);
      double sum = 0;
      const std::vector<double> y = conv.y.to_double(), dy = conv.dy.to_double(),
                                state = conv.state.to_double();
      for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
      for (size_t i = 0; i < state.size() && c.state; ++i) sum += state[i] * conv.dfinal[i];
      return sum;
    };
    conv.dweight.zero();
    conv.dbias.zero();
    conv.backward(ctx);
    Rng rng(3);
    EXPECT_TRUE(op_test::gradient_matches(conv.x, conv.dx.to_double(), objective, rng));
    EXPECT_TRUE(op_test::gradient_matches(conv.weight, conv.dweight.to_double(), objective, rng));
    if (c.bias) {
      EXPECT_TRUE(op_test::gradient_matches(conv.bias, conv.dbias.to_double(), objective, rng));
    }
    if (c.state) {
      TestTensor start(DType::f64, {conv.num_seqs + 1, c.d_conv - 1, c.d_inner});
      start.values(conv.initial);
      const auto from_start = [&] {
        conv.initial = start.to_double();
        return objective();
      };
      EXPECT_TRUE(op_test::gradient_matches(start, conv.dstate.to_double(), from_start, rng));
    }
  }
}

struct Tolerance {
  double forward, gradient;  // f32
};

void check_against_reference(Context& ctx, const Case& c, DType type, Tolerance tolerance) {
  SCOPED_TRACE(::testing::PrintToString(c) + " " + name_of(type));
  Context reference(reference_engine());
  Conv actual(c, type), oracle(c, DType::f64);
  oracle.take(actual);
  const auto agree = [&](const char* name, const TestTensor& a, const TestTensor& b, double limit) {
    if (a.view().dtype == DType::bf16) {
      EXPECT_TRUE(close_bf16(a, b.to_double())) << name;
    } else {
      EXPECT_TRUE(close(a, b.to_double(), limit)) << name;
    }
  };
  oracle.forward(reference);
  actual.forward(ctx);
  agree("y", actual.y, oracle.y, tolerance.forward);
  agree("state", actual.state, oracle.state, 0);
  oracle.backward(reference);
  actual.backward(ctx);
  agree("dx", actual.dx, oracle.dx, tolerance.forward);
  agree("dweight", actual.dweight, oracle.dweight, tolerance.gradient);
  agree("dbias", actual.dbias, oracle.dbias, tolerance.gradient);
  agree("dstate", actual.dstate, oracle.dstate, tolerance.forward);
  EXPECT_TRUE(actual.guards_intact());
}

// Inputs that are rounded, once, and nothing else.
void check_states_in_bf16(Context& ctx, const Case& c, DType type, double tolerance) {
  if (!c.state) return;
  SCOPED_TRACE(::testing::PrintToString(c) + " " + name_of(type));
  Context reference(reference_engine());
  Conv actual(c, type, DType::bf16), oracle(c, DType::f64);
  oracle.take(actual);
  oracle.forward(reference);
  actual.forward(ctx);
  if (type == DType::bf16) {
    EXPECT_TRUE(close_bf16(actual.y, oracle.y.to_double()));
  } else {
    EXPECT_TRUE(close(actual.y, oracle.y.to_double(), tolerance));
  }
  TestTensor rounded(DType::bf16, {actual.num_seqs + 1, c.d_conv - 1, c.d_inner});
  rounded.copy(oracle.state);
  EXPECT_TRUE(op_test::bitwise_equal(actual.state, rounded));
  EXPECT_TRUE(actual.guards_intact());
}

// One sequence cut in two with the state between them, and token by token.
void check_split(Context& ctx, int64_t d_inner, DType type, DType states = DType::f32) {
  const Case c = {.lengths = {70}, .d_inner = d_inner};
  Conv whole(c, type, states);
  whole.forward(ctx);
  for (int64_t cut : {1, 2, 3, 63, 64, 65, 69}) {
    Conv parts(c, type, states);
    parts.state.values(parts.initial);
    for (auto [begin, end] : {std::pair{int64_t{0}, cut}, {cut, int64_t{70}}}) {
      CausalConv1d op = parts.op;
      for (Tensor* t : {&op.x, &op.y}) *t = t->slice(0, begin, end);
      TestTensor start(DType::i32, {2});
      start.values({0, static_cast<double>(end - begin)});
      op.seq_start = start;
      causal_conv1d_fwd(ctx, op);
      EXPECT_TRUE(start.guards_intact());  // waits before start goes
    }
    EXPECT_TRUE(op_test::bitwise_equal(parts.y, whole.y)) << cut;
    EXPECT_TRUE(op_test::bitwise_equal(parts.state, whole.state)) << cut;
  }
  Conv steps(c, type, states);
  steps.state.values(steps.initial);
  for (int64_t t = 0; t < 70; ++t) {
    CausalConv1d op = steps.op;
    for (Tensor* x : {&op.x, &op.y}) *x = x->slice(0, t, t + 1);
    op.seq_start = Tensor();
    causal_conv1d_step(ctx, op);
  }
  EXPECT_TRUE(op_test::bitwise_equal(steps.y, whole.y));
  EXPECT_TRUE(op_test::bitwise_equal(steps.state, whole.state));
}

const Case kPacked = {.lengths = {70, 3, 130, 40}, .d_inner = 30};

// Both passes on both contexts (or twice on one).
void check_same_bits(Context& one, Context& two, const Case& c) {
  Conv a(c, DType::f32), b(c, DType::f32);
  for (auto [conv, ctx] : {std::pair{&a, &one}, {&b, &two}}) {
    conv->forward(*ctx);
    conv->backward(*ctx);
  }
  for (auto [x, y] : {std::pair{&a.y, &b.y},
                      {&a.dx, &b.dx},
                      {&a.dweight, &b.dweight},
                      {&a.dbias, &b.dbias},
                      {&a.dstate, &b.dstate}})
    EXPECT_TRUE(op_test::bitwise_equal(*x, *y));
}

// Each sequence of a batch gives the bits that it gives alone.
void check_packed_is_separate(Context& ctx, const Case& c) {
  Conv a(c, DType::f32);
  a.forward(ctx);
  a.backward(ctx);
  int64_t begin = 0;
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    const int64_t end = begin + c.lengths[s];
    Conv alone(c, DType::f32);
    CausalConv1d op = alone.op;
    CausalConv1dGrad grad = alone.grad;
    TestTensor start(DType::i32, {2}), slot(DType::i32, {1});
    start.values({0, static_cast<double>(end - begin)});
    slot.values({static_cast<double>(c.lengths.size() - s)});
    for (Tensor* t : {&op.x, &op.y, &grad.dy, &grad.dx}) *t = t->slice(0, begin, end);
    op.seq_start = start;
    op.slot = slot;
    causal_conv1d_fwd(ctx, op);
    EXPECT_TRUE(op_test::bitwise_equal(op.y, a.op.y.slice(0, begin, end)));
    alone.state.values(alone.initial);
    causal_conv1d_bwd(ctx, op, grad);
    EXPECT_TRUE(op_test::bitwise_equal(grad.dx, a.grad.dx.slice(0, begin, end)));
    begin = end;
  }
}

TEST(CausalConv1d, CpuMatchesTheReferenceOnEverySimdTarget) {
  op_test::for_each_simd_target([] {
    Context cpu(cpu_engine(), 2);
    for (const Case& c : cases())
      for (DType type : {DType::f32, DType::bf16})
        check_against_reference(cpu, c, type, {.forward = 1e-6, .gradient = 1e-5});
  });
}

TEST(CausalConv1d, StatesInBf16AreRoundedOnce) {
  Context reference(reference_engine(), 1);
  for (const Case& c : cases()) check_states_in_bf16(reference, c, DType::f32, 1e-6);
  op_test::for_each_simd_target([] {
    Context cpu(cpu_engine(), 2);
    for (const Case& c : cases())
      for (DType type : {DType::f32, DType::bf16}) check_states_in_bf16(cpu, c, type, 1e-6);
  });
}

// With bf16 inputs a state in bf16 loses nothing.
TEST(CausalConv1d, SplitAnywhereAndStepByStepAreTheWholePass) {
  Context cpu(cpu_engine(), 2);
  check_split(cpu, 21, DType::f32);
  check_split(cpu, 21, DType::bf16, DType::bf16);
}

TEST(CausalConv1d, PackedIsSeparateAndThreadsDoNotMatter) {
  Context one(cpu_engine(), 1), two(cpu_engine(), 2);
  check_same_bits(one, two, kPacked);
  check_packed_is_separate(two, kPacked);
}

// Besides the CPU's cases: 16-byte accesses (widths and strides of 8), several blocks along
// channels and tokens, runs that begin and end inside sequences.
TEST(CausalConv1dCuda, MatchesTheReference) {
  op_test::on_cuda([](Context& ctx) {
    std::vector<Case> all = cases();
    all.push_back({.lengths = {31, 0, 33, 129, 2, 1}, .d_inner = 264});
    all.push_back({.lengths = {600, 1, 65}, .d_inner = 48, .d_conv = 3, .strided = true});
    all.push_back({.lengths = {200, 3}, .d_inner = 40, .d_conv = 2, .bias = false, .state = false});
    all.push_back({.lengths = {3000, 4096, 5}, .d_inner = 512});
    for (const Case& c : all)
      for (DType type : {DType::f32, DType::bf16})
        check_against_reference(ctx, c, type, {.forward = 3e-6, .gradient = 1e-5});
  });
}

TEST(CausalConv1dCuda, StatesInBf16AreRoundedOnce) {
  op_test::on_cuda([](Context& ctx) {
    std::vector<Case> all = cases();
    all.push_back({.lengths = {31, 0, 33, 129, 2, 1}, .d_inner = 264});
    all.push_back({.lengths = {600, 1, 65}, .d_inner = 48, .d_conv = 3, .strided = true});
    for (const Case& c : all)
      for (DType type : {DType::f32, DType::bf16}) check_states_in_bf16(ctx, c, type, 3e-6);
  });
}

TEST(CausalConv1dCuda, SplitAnywhereAndStepByStepAreTheWholePass) {
  op_test::on_cuda([](Context& ctx) {
    for (int64_t d_inner : {21, 24}) {
      for (DType type : {DType::f32, DType::bf16}) check_split(ctx, d_inner, type);
      check_split(ctx, d_inner, DType::bf16, DType::bf16);
    }
  });
}

TEST(CausalConv1dCuda, PackedIsSeparateAndTheSameBitsTwice) {
  op_test::on_cuda([](Context& ctx) {
    for (const Case& c : {kPacked, Case{.lengths = {70, 3, 130, 900}, .d_inner = 32}}) {
      check_same_bits(ctx, ctx, c);
      check_packed_is_separate(ctx, c);
    }
  });
}

TEST(CausalConv1dCuda, LargeInputsStayFinite) {
  op_test::on_cuda([](Context& ctx) {
    const Case c = {.lengths = {70, 3}, .d_inner = 24};
    Conv conv(c, DType::f32);
    Rng rng(1);
    conv.x.normal(rng, 1e4);
    conv.forward(ctx);
    conv.backward(ctx);
    for (const TestTensor* t : {&conv.y, &conv.dx, &conv.dweight, &conv.dbias, &conv.dstate})
      for (double x : t->to_double()) ASSERT_TRUE(std::isfinite(x));
  });
}

}  // namespace
}  // namespace krait
