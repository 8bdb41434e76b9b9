// What the tests of the selective scan share: cases, tensors for them, and what every engine is
// held to.
#pragma once

#include <cmath>
#include <optional>

#include "ops/op_test.h"
#include "ops/selective_scan.h"

namespace krait::scan_test {

using op_test::close;

using op_test::close_bf16;

using op_test::TestTensor;

struct Case {
  std::vector<int> lengths;  // of the packed sequences
  int64_t d_inner, d_state, n_groups = 1;
  bool z = true, D = true, dt_bias = true, state = true;
  bool strided = false;  // rows with gaps, B and C as views into one tensor
};

inline std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << "lengths";
  for (int l : c.lengths) out << " " << l;
  return out << ", d_inner " << c.d_inner << ", d_state " << c.d_state << ", groups " << c.n_groups
             << (c.z ? "" : ", no z") << (c.D ? "" : ", no D") << (c.dt_bias ? "" : ", no bias")
             << (c.state ? "" : ", no state");
}

// Sequence lengths around the chunk (32), widths around the lanes (4, 8, 16) and the block (64),
// every optional argument absent once.
inline const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {.lengths = {1}, .d_inner = 1, .d_state = 1},
      {.lengths = {2}, .d_inner = 3, .d_state = 2},
      {.lengths = {31}, .d_inner = 4, .d_state = 16},
      {.lengths = {32}, .d_inner = 5, .d_state = 16, .z = false},
      {.lengths = {33}, .d_inner = 7, .d_state = 5, .D = false},
      {.lengths = {67}, .d_inner = 15, .d_state = 16, .state = false},
      {.lengths = {64}, .d_inner = 16, .d_state = 8, .dt_bias = false},
      {.lengths = {40}, .d_inner = 17, .d_state = 64},
      {.lengths = {3, 1, 0, 34, 65, 2}, .d_inner = 24, .d_state = 16},
      {.lengths = {5, 70, 31, 32, 33}, .d_inner = 6, .d_state = 3, .n_groups = 2, .strided = true},
      {.lengths = {37, 20}, .d_inner = 130, .d_state = 16, .n_groups = 2},
      {.lengths = {35}, .d_inner = 200, .d_state = 4, .strided = true},
      {.lengths = {9}, .d_inner = 3, .d_state = 256, .n_groups = 3},
      {.lengths = {0, 0}, .d_inner = 4, .d_state = 4},
      {.lengths = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
       .d_inner = 10,
       .d_state = 16,
       .z = false,
       .D = false,
       .dt_bias = false},
  };
  return all;
}

// All arguments of forward and backward in one element type; outputs are NaN.
struct Scan {
  int64_t tokens, num_seqs, slots;
  DType type, full;
  TestTensor u, dt, A, bc, D, dt_bias, z, seq_start, slot, state, y, y_again;
  TestTensor dy, du, ddt, dA, dbc, dD, ddt_bias, dz, dstate;
  SelectiveScan op;
  SelectiveScanGrad grad;
  std::vector<double> initial, dfinal;
  bool keeps_states = true;         // for the backward pass
  std::optional<TestTensor> saved;  // they: as much as the engine wants

  static int64_t total(const Case& c) {
    int64_t n = 0;
    for (int l : c.lengths) n += l;
    return n;
  }

  Scan(const Case& c, DType t) : Scan(c, t, t == DType::f64 ? DType::f64 : DType::f32) {}

  Scan(const Case& c, DType t, DType states)
      : tokens(total(c)),
        num_seqs(static_cast<int64_t>(c.lengths.size())),
        slots(num_seqs + 2),
        type(t),
        full(t == DType::f64 ? DType::f64 : DType::f32),
        u(t, {tokens, c.d_inner}, c.strided ? 2 * c.d_inner + 3 : 0),
        dt(t, {tokens, c.d_inner}, c.strided ? c.d_inner + 1 : 0),
        A(full, {c.d_inner, c.d_state}),
        bc(t, {tokens, 2 * c.n_groups, c.d_state}, c.strided ? 2 * c.n_groups * c.d_state + 5 : 0),
        D(full, {c.d_inner}),
        dt_bias(full, {c.d_inner}),
        z(t, {tokens, c.d_inner}, c.strided ? 2 * c.d_inner + 3 : 0),
        seq_start(DType::i32, {num_seqs + 1}),
        slot(DType::i32, {num_seqs}),
        state(states, {slots, c.d_inner, c.d_state}),
        y(t, {tokens, c.d_inner}, c.strided ? c.d_inner + 7 : 0),
        y_again(t, {tokens, c.d_inner}, c.strided ? c.d_inner + 4 : 0),
        dy(t, {tokens, c.d_inner}),
        du(t, {tokens, c.d_inner}, c.strided ? c.d_inner + 2 : 0),
        ddt(t, {tokens, c.d_inner}),
        dA(full, {c.d_inner, c.d_state}),
        dbc(t, {tokens, 2 * c.n_groups, c.d_state}, c.strided ? 2 * c.n_groups * c.d_state + 5 : 0),
        dD(full, {c.d_inner}),
        ddt_bias(full, {c.d_inner}),
        dz(t, {tokens, c.d_inner}, c.strided ? 2 * c.d_inner : 0),
        dstate(full, {slots, c.d_inner, c.d_state}) {
    Rng rng(17);
    u.normal(rng);
    dt.normal(rng);
    A.uniform(rng, -8, -0.2);
    bc.normal(rng);
    D.normal(rng);
    dt_bias.uniform(rng, -5, -1);
    z.normal(rng);
    state.normal(rng);
    dy.normal(rng);
    dstate.normal(rng);
    for (TestTensor* sum : {&dA, &dD, &ddt_bias}) sum->normal(rng);  // added to
    std::vector<double> starts = {0}, places;
    for (int l : c.lengths) starts.push_back(starts.back() + l);
    for (int64_t s = 0; s < num_seqs; ++s) places.push_back(static_cast<double>(num_seqs - s));
    seq_start.values(starts);
    slot.values(places);
    initial = state.to_double();
    dfinal = dstate.to_double();
    const auto when = [](bool have, const TestTensor& x) { return have ? x.view() : Tensor(); };
    op = {.u = u,
          .dt = dt,
          .A = A,
          .B = bc.view().slice(1, 0, c.n_groups),
          .C = bc.view().slice(1, c.n_groups, 2 * c.n_groups),
          .D = when(c.D, D),
          .dt_bias = when(c.dt_bias, dt_bias),
          .z = when(c.z, z),
          .seq_start = seq_start,
          .state = when(c.state, state),
          .slot = slot,
          .y = y,
          .saved = {}};
    grad = {.dy = dy,
            .du = du,
            .ddt = ddt,
            .dA = dA,
            .dB = dbc.view().slice(1, 0, c.n_groups),
            .dC = dbc.view().slice(1, c.n_groups, 2 * c.n_groups),
            .dD = when(c.D, dD),
            .ddt_bias = when(c.dt_bias, ddt_bias),
            .dz = when(c.z, dz),
            .dstate = when(c.state, dstate),
            .y = y_again};
  }

  // The same values as another scan, rounded to this one's types only where that one's are finer.
  void take(const Scan& other) {
    for (auto [mine, theirs] : {std::pair{&u, &other.u},
                                {&dt, &other.dt},
                                {&A, &other.A},
                                {&bc, &other.bc},
                                {&D, &other.D},
                                {&dt_bias, &other.dt_bias},
                                {&z, &other.z},
                                {&state, &other.state},
                                {&dy, &other.dy},
                                {&dA, &other.dA},
                                {&dD, &other.dD},
                                {&ddt_bias, &other.ddt_bias},
                                {&dstate, &other.dstate}})
      mine->copy(*theirs);
    initial = state.to_double();
    dfinal = dstate.to_double();
  }
  void forward(Context& ctx) {
    state.values(initial);
    keep_states(ctx);
    selective_scan_fwd(ctx, op);
  }
  void keep_states(const Context& ctx) {
    if (!keeps_states || op.saved) return;
    saved.emplace(full, std::initializer_list<int64_t>{selective_scan_saved_size(
                            ctx, tokens, A.view().shape[0], A.view().shape[1])});
    op.saved = *saved;
  }
  void backward(Context& ctx) {
    state.values(initial);
    dstate.values(dfinal);
    keep_states(ctx);
    selective_scan_bwd(ctx, op, grad);
  }
  bool guards_intact() const {
    for (const TestTensor* t : {&u, &dt, &A, &bc, &z, &state, &y, &y_again, &dy, &du, &ddt, &dA,
                                &dbc, &dD, &ddt_bias, &dz, &dstate})
      if (!t->guards_intact()) return false;
    return !saved || saved->guards_intact();
  }
};

// How far an engine may be from the double reference (DESIGN.md, section 8).
struct Tolerances {
  double forward, gradient;
  double gain;  // of a slow mode, times delta |A|
};

inline constexpr Tolerances kCpu = {.forward = 1e-6, .gradient = 1e-5, .gain = 1e-7};

inline constexpr Tolerances kCuda = {.forward = 3e-6, .gradient = 1e-5, .gain = 2.5e-7};

// f32: within the tolerance; bf16: no further than twice what rounding costs.
inline void expect_agrees(const char* name, const TestTensor& actual, const TestTensor& oracle,
                          double tolerance) {
  if (actual.view().dtype == DType::bf16) {
    EXPECT_TRUE(close_bf16(actual, oracle.to_double())) << name;
  } else {
    EXPECT_TRUE(close(actual, oracle.to_double(), tolerance)) << name;
  }
}

inline void expect_forward_like_reference(Context& ctx, const Tolerances& tolerances, const Case& c,
                                          DType type, DType states = DType::f32) {
  Context reference(reference_engine());
  Scan actual(c, type, states), oracle(c, DType::f64);
  oracle.take(actual);
  oracle.forward(reference);
  actual.forward(ctx);
  if (actual.tokens == 0) {
    EXPECT_EQ(actual.state.to_double(), actual.initial);
    return;
  }
  expect_agrees("y", actual.y, oracle.y, tolerances.forward);
  if (c.state) expect_agrees("state", actual.state, oracle.state, tolerances.forward);
  EXPECT_TRUE(actual.guards_intact());
}

inline void expect_backward_like_reference(Context& ctx, const Tolerances& tolerances,
                                           const Case& c, DType type, bool with_saved) {
  Context reference(reference_engine());
  Scan actual(c, type), oracle(c, DType::f64);
  if (actual.tokens == 0) return;
  oracle.take(actual);
  actual.keeps_states = with_saved;
  if (with_saved) actual.forward(ctx);
  oracle.forward(reference);
  oracle.backward(reference);
  actual.backward(ctx);
  const auto agree = [&](const char* name, const TestTensor& a, const TestTensor& b) {
    expect_agrees(name, a, b, tolerances.gradient);
  };
  expect_agrees("y again", actual.y_again, oracle.y, tolerances.forward);
  agree("du", actual.du, oracle.du);
  agree("ddt", actual.ddt, oracle.ddt);
  agree("dA", actual.dA, oracle.dA);
  agree("dB, dC", actual.dbc, oracle.dbc);
  if (c.D) agree("dD", actual.dD, oracle.dD);
  if (c.dt_bias) agree("ddt_bias", actual.ddt_bias, oracle.ddt_bias);
  if (c.z) agree("dz", actual.dz, oracle.dz);
  if (c.state) agree("dstate", actual.dstate, oracle.dstate);
  EXPECT_TRUE(actual.guards_intact());
}

// du in the place of dy and ddt in that of dt have the bits that they have elsewhere.
inline void expect_gradients_in_place(Context& ctx, const Case& c, DType type) {
  Scan apart(c, type), in_place(c, type);
  if (apart.tokens == 0) return;
  in_place.grad.du = in_place.grad.dy;
  in_place.grad.ddt = in_place.op.dt;
  for (Scan* scan : {&apart, &in_place}) {
    scan->forward(ctx);
    scan->backward(ctx);
  }
  for (const auto member : {&SelectiveScanGrad::du, &SelectiveScanGrad::ddt, &SelectiveScanGrad::dA,
                            &SelectiveScanGrad::dB, &SelectiveScanGrad::dC, &SelectiveScanGrad::y})
    EXPECT_TRUE(op_test::bitwise_equal(in_place.grad.*member, apart.grad.*member));
  for (const auto member : {&SelectiveScanGrad::dD, &SelectiveScanGrad::ddt_bias,
                            &SelectiveScanGrad::dz, &SelectiveScanGrad::dstate})
    if (apart.grad.*member) {
      EXPECT_TRUE(op_test::bitwise_equal(in_place.grad.*member, apart.grad.*member));
    }
  EXPECT_TRUE(in_place.guards_intact());
}

// The first sequence of a scan, cut into parts that hand on the state.
inline void expect_split_is_whole(Context& ctx, const Tolerances& tolerances, const Case& whole,
                                  const std::vector<int64_t>& cuts) {
  Scan scan(whole, DType::f32);
  scan.forward(ctx);
  const std::vector<double> y = scan.y.to_double(), final_state = scan.state.to_double();
  for (int64_t cut : cuts) {
    Scan parts(whole, DType::f32);
    parts.state.values(parts.initial);
    for (auto [begin, end] : {std::pair{int64_t{0}, cut}, {cut, scan.tokens}}) {
      SelectiveScan op = parts.op;
      for (Tensor* t : {&op.u, &op.dt, &op.B, &op.C, &op.z, &op.y}) *t = t->slice(0, begin, end);
      op.saved = Tensor();
      TestTensor start(DType::i32, {2});
      start.values({0, static_cast<double>(end - begin)});
      op.seq_start = start;
      selective_scan_fwd(ctx, op);
      ctx.engine().synchronize(ctx);  // before `start` goes
    }
    EXPECT_TRUE(close(parts.y, y, tolerances.forward)) << cut;
    EXPECT_TRUE(close(parts.state, final_state, tolerances.forward)) << cut;
  }
}

inline void expect_steps_are_the_pass(Context& ctx, const Tolerances& tolerances) {
  for (int64_t d_state : {1, 3, 16, 21, 64}) {
    const Case c = {
        .lengths = {40}, .d_inner = 70, .d_state = d_state, .n_groups = d_state % 2 + 1};
    Scan whole(c, DType::f32), steps(c, DType::f32);
    whole.forward(ctx);
    steps.state.values(steps.initial);
    for (int64_t t = 0; t < 40; ++t) {
      SelectiveScan op = steps.op;
      for (Tensor* x : {&op.u, &op.dt, &op.B, &op.C, &op.z, &op.y}) *x = x->slice(0, t, t + 1);
      op.seq_start = op.saved = Tensor();
      selective_scan_step(ctx, op);
    }
    EXPECT_TRUE(close(steps.y, whole.y.to_double(), tolerances.forward)) << d_state;
    EXPECT_TRUE(close(steps.state, whole.state.to_double(), tolerances.forward)) << d_state;
    EXPECT_TRUE(steps.guards_intact());
  }
}

// Each from the state that the one before left, which is rounded once.
inline void expect_steps_to_round_once(Context& ctx, const Tolerances& tolerances, DType type) {
  Context reference(reference_engine());
  for (int64_t d_state : {1, 3, 16, 21, 64}) {
    SCOPED_TRACE(d_state);
    const Case c = {
        .lengths = {20}, .d_inner = 70, .d_state = d_state, .n_groups = d_state % 2 + 1};
    Scan actual(c, type, DType::bf16), oracle(c, DType::f64);
    oracle.take(actual);
    for (int64_t t = 0; t < 20; ++t) {
      oracle.state.copy(actual.state);
      for (auto [scan, context] : {std::pair{&actual, &ctx}, {&oracle, &reference}}) {
        SelectiveScan op = scan->op;
        for (Tensor* x : {&op.u, &op.dt, &op.B, &op.C, &op.z, &op.y}) *x = x->slice(0, t, t + 1);
        op.seq_start = op.saved = Tensor();
        selective_scan_step(*context, op);
      }
      EXPECT_TRUE(close_bf16(actual.state, oracle.state.to_double())) << t;
      const std::vector<double> y = op_test::to_double(actual.op.y.slice(0, t, t + 1)),
                                expected = op_test::to_double(oracle.op.y.slice(0, t, t + 1));
      EXPECT_TRUE(close(y, expected, type == DType::bf16 ? 4e-3 : tolerances.forward)) << t;
    }
    EXPECT_TRUE(actual.guards_intact());
  }
}

inline void expect_states_in_bf16(Context& ctx, const Tolerances& tolerances,
                                  std::initializer_list<const std::vector<Case>*> lists) {
  for (DType type : {DType::f32, DType::bf16}) {
    for (const auto* list : lists)
      for (const Case& c : *list) {
        if (!c.state) continue;
        SCOPED_TRACE(::testing::PrintToString(c) + " " + name_of(type));
        expect_forward_like_reference(ctx, tolerances, c, type, DType::bf16);
      }
    expect_steps_to_round_once(ctx, tolerances, type);
  }
}

// A sequence's bits, forward and backward, do not depend on its neighbours and its slot. `alone`
// computes one sequence at a time.
inline void expect_packed_is_separate(Context& together, Context& alone, const Case& packed,
                                      DType type = DType::f32) {
  SCOPED_TRACE(::testing::PrintToString(packed) + " " + name_of(type));
  Scan all(packed, type);
  all.forward(together);
  TestTensor after(DType::f32, {all.slots, packed.d_inner, packed.d_state});
  after.copy(all.state);
  all.backward(together);
  // The sequences have rows and slots of their own, so one set of tensors, NaN where none has been
  // yet, serves them all: making it anew for each takes most of the time.
  Scan one(packed, type);
  int64_t begin = 0;
  for (size_t s = 0; s < packed.lengths.size(); ++s) {
    const int64_t end = begin + packed.lengths[s];
    SelectiveScan op = one.op;
    SelectiveScanGrad grad = one.grad;
    for (Tensor* t : {&op.u, &op.dt, &op.B, &op.C, &op.z, &op.y}) *t = t->slice(0, begin, end);
    for (Tensor* t : {&grad.dy, &grad.du, &grad.ddt, &grad.dB, &grad.dC, &grad.dz, &grad.y})
      *t = t->slice(0, begin, end);
    TestTensor start(DType::i32, {2}), slot(DType::i32, {1});
    start.values({0, static_cast<double>(end - begin)});
    slot.values({static_cast<double>(packed.lengths.size() - s)});
    op.seq_start = start;
    op.slot = slot;
    op.saved = Tensor();
    one.state.values(one.initial);
    selective_scan_fwd(alone, op);
    EXPECT_TRUE(op_test::bitwise_equal(op.y, all.op.y.slice(0, begin, end)));
    const int64_t row = static_cast<int64_t>(packed.lengths.size() - s);
    const auto state_of = [row](const TestTensor& t) { return t.view().slice(0, row, row + 1); };
    EXPECT_TRUE(op_test::bitwise_equal(state_of(one.state), state_of(after)));
    one.state.values(one.initial);
    selective_scan_bwd(alone, op, grad);
    for (auto [mine, together_] : {std::pair{&grad.du, &all.grad.du},
                                   {&grad.ddt, &all.grad.ddt},
                                   {&grad.dB, &all.grad.dB},
                                   {&grad.dC, &all.grad.dC},
                                   {&grad.dz, &all.grad.dz},
                                   {&grad.y, &all.grad.y}})
      EXPECT_TRUE(op_test::bitwise_equal(*mine, together_->slice(0, begin, end)));
    EXPECT_TRUE(op_test::bitwise_equal(state_of(one.dstate), state_of(all.dstate)));
    begin = end;
  }
}

inline void expect_same_bits(Context& first, Context& second, const Case& c,
                             DType type = DType::f32) {
  Scan a(c, type), b(c, type);
  for (auto [scan, ctx] : {std::pair{&a, &first}, {&b, &second}}) {
    scan->forward(*ctx);
    scan->backward(*ctx);
  }
  std::vector<std::pair<TestTensor*, TestTensor*>> outputs = {{&a.y, &b.y}, {&a.state, &b.state}};
  for (auto [x, y] : {std::pair{&a.du, &b.du},
                      {&a.ddt, &b.ddt},
                      {&a.dz, &b.dz},
                      {&a.dA, &b.dA},
                      {&a.dbc, &b.dbc},
                      {&a.dD, &b.dD},
                      {&a.ddt_bias, &b.ddt_bias},
                      {&a.dstate, &b.dstate}})
    outputs.emplace_back(x, y);
  for (auto [x, y] : outputs) EXPECT_TRUE(op_test::bitwise_equal(*x, *y));
}

// A constant parameter given as a row that repeats (stride 0) is the same as its copies.
inline void expect_rows_may_repeat(Context& ctx) {
  const Case c = {.lengths = {45}, .d_inner = 18, .d_state = 16};
  Scan scan(c, DType::f32), copies(c, DType::f32);
  TestTensor row(DType::f32, {1, 16}), zeros(DType::f32, {18});
  Rng rng(2);
  row.normal(rng);
  zeros.zero();
  scan.op.B = broadcast_rows(row.view(), 45);
  scan.op.dt = broadcast_rows(zeros.view(), 45);
  copies.dt.zero();
  for (int64_t t = 0; t < 45; ++t)
    for (int64_t n = 0; n < 16; ++n) copies.op.B.row<float>(t)[n] = row.view().ptr<float>()[n];
  for (Scan* s : {&scan, &copies}) {
    s->forward(ctx);
    s->backward(ctx);
  }
  EXPECT_TRUE(op_test::bitwise_equal(scan.y, copies.y));
  EXPECT_TRUE(op_test::bitwise_equal(scan.dbc, copies.dbc));
  EXPECT_TRUE(op_test::bitwise_equal(scan.ddt, copies.ddt));
}

// With a constant input the state must reach B u / |A|: a slow mode shows every error of exp (facts
// of DESIGN.md, section 8). By `_step` as well when it takes `max_steps` or fewer.
inline void expect_gain(Context& ctx, const Tolerances& tolerances, double rate,
                        int64_t max_steps) {
  const int64_t chunk = 4096, rounds = static_cast<int64_t>(20 / rate) / chunk + 1;
  TestTensor u(DType::f32, {chunk, 1}), dt(DType::f32, {chunk, 1}), A(DType::f32, {1, 1}),
      bc(DType::f32, {chunk, 1, 1});
  TestTensor y(DType::f32, {chunk, 1}), state(DType::f32, {1, 1, 1}),
      stepped(DType::f32, {1, 1, 1}), start(DType::i32, {2});
  const double delta = 0.0123, raw = std::log(std::expm1(delta));
  const float A_value = static_cast<float>(-rate / delta);
  // The oracle is the recurrence in double on the rounded inputs: it settles at delta / (1 -
  // exp(delta A)).
  dt.values(std::vector<double>(static_cast<size_t>(chunk), raw));
  const double rounded = std::log1p(std::exp(static_cast<double>(dt.view().ptr<float>()[0])));
  const double gain = rounded / -std::expm1(rounded * A_value);
  u.values(std::vector<double>(static_cast<size_t>(chunk), 1));
  bc.values(std::vector<double>(static_cast<size_t>(chunk), 1));
  A.values({A_value});
  state.zero();
  stepped.zero();
  start.values({0, static_cast<double>(chunk)});
  SelectiveScan op = {.u = u,
                      .dt = dt,
                      .A = A,
                      .B = bc,
                      .C = bc,
                      .D = {},
                      .dt_bias = {},
                      .z = {},
                      .seq_start = start,
                      .state = state,
                      .slot = {},
                      .y = y,
                      .saved = {}};
  for (int64_t i = 0; i < rounds; ++i) selective_scan_fwd(ctx, op);
  EXPECT_LE(std::abs(state.to_double()[0] / gain - 1), tolerances.gain / rate) << rate;
  if (rounds * chunk > max_steps) return;
  for (Tensor* t : {&op.u, &op.dt, &op.B, &op.C, &op.y}) *t = t->slice(0, 0, 1);
  op.seq_start = Tensor();
  op.state = stepped;
  for (int64_t i = 0; i < rounds * chunk; ++i) selective_scan_step(ctx, op);
  EXPECT_LE(std::abs(stepped.to_double()[0] / gain - 1), tolerances.gain / rate) << "step " << rate;
}

inline constexpr double kSlowRates[] = {1e-1, 1e-2, 1e-3, 1e-4, 1e-5};  // delta |A|

inline void expect_extremes_stay_finite(Context& ctx) {
  const Case c = {.lengths = {70}, .d_inner = 19, .d_state = 16};
  Scan scan(c, DType::f32);
  Rng rng(9);
  scan.u.uniform(rng, -1e4, 1e4);
  scan.dt.uniform(rng, -100, 100);
  scan.dt_bias.zero();
  std::vector<double> A;
  for (int i = 0; i < 19 * 16; ++i) A.push_back(-std::exp(rng.uniform(-10, 10)));
  scan.A.values(A);
  scan.forward(ctx);
  std::vector<const TestTensor*> outputs = {&scan.y, &scan.state};
  scan.backward(ctx);
  outputs.insert(outputs.end(), {&scan.du, &scan.ddt, &scan.dA, &scan.dbc, &scan.dz, &scan.dstate});
  for (const TestTensor* t : outputs)
    for (double v : t->to_double()) ASSERT_TRUE(std::isfinite(v));
}

}  // namespace krait::scan_test
