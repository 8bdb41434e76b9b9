// A step of the scan with dt_proj, for tests of it.
#pragma once

#include <ostream>
#include <vector>

#include "ops/op_test.h"
#include "ops/selective_scan.h"

namespace krait::step_test {

using op_test::TestTensor;

// Whole numbers / 8, of which sums are exact in f32 in any order.
inline void eighths(TestTensor& t, Rng& rng, int most) {
  std::vector<double> values(static_cast<size_t>(t.view().size()));
  for (double& x : values)
    x = (static_cast<double>(rng.below(static_cast<uint64_t>(2 * most + 1))) - most) / 8;
  t.values(values);
}

// Normal numbers, of which millions repeat a prime number of them.
inline void repeated_normals(TestTensor& t, Rng& rng) {
  std::vector<double> some(9973), values(static_cast<size_t>(t.view().size()));
  for (double& x : some) x = rng.normal();
  for (size_t i = 0; i < values.size(); ++i) values[i] = some[i % some.size()];
  t.values(values);
}

struct StepCase {
  int64_t num_seqs, d_inner, dt_rank, d_state = 16;
  bool z = true, D = true, dt_bias = true, slots = true;
};

inline std::ostream& operator<<(std::ostream& out, const StepCase& c) {
  return out << c.num_seqs << " sequences, d_inner " << c.d_inner << ", dt_rank " << c.dt_rank
             << ", d_state " << c.d_state << (c.z ? "" : ", no z") << (c.D ? "" : ", no D")
             << (c.dt_bias ? "" : ", no bias") << (c.slots ? "" : ", no slots");
}

// A step with dt_proj. Slots run backwards, with others between them.
struct Step {
  DType type, full;
  int64_t slots;
  TestTensor u, x_dbl, dt_proj, A, D, dt_bias, z, slot, state, y;
  SelectiveScan op;
  std::vector<double> initial;

  Step(const StepCase& c, DType t) : Step(c, t, t == DType::f64 ? DType::f64 : DType::f32) {}

  Step(const StepCase& c, DType t, DType states)
      : type(t),
        full(t == DType::f64 ? DType::f64 : DType::f32),
        slots(2 * c.num_seqs + 1),
        u(t, {c.num_seqs, c.d_inner}),
        x_dbl(t, {c.num_seqs, 1, c.dt_rank + 2 * c.d_state}),
        dt_proj(t, {c.d_inner, c.dt_rank}),
        A(full, {c.d_inner, c.d_state}),
        D(full, {c.d_inner}),
        dt_bias(full, {c.d_inner}),
        z(t, {c.num_seqs, c.d_inner}, 2 * c.d_inner),
        slot(DType::i32, {c.num_seqs}),
        state(states, {slots, c.d_inner, c.d_state}),
        y(t, {c.num_seqs, c.d_inner}, 2 * c.d_inner) {
    Rng rng(5);
    u.normal(rng);
    eighths(x_dbl, rng, 16);
    eighths(dt_proj, rng, 3);
    A.uniform(rng, -8, -0.2);
    D.normal(rng);
    dt_bias.uniform(rng, -5, -1);
    z.normal(rng);
    repeated_normals(state, rng);
    std::vector<double> places;
    for (int64_t s = 0; s < c.num_seqs; ++s)
      places.push_back(static_cast<double>(c.slots ? slots - 2 - 2 * s : s));
    slot.values(places);
    initial = state.to_double();
    const int64_t r = c.dt_rank, n = c.d_state;
    const Tensor rows = x_dbl;
    Tensor dt = rows.slice(2, 0, r);
    dt.rank = 2, dt.shape[1] = r, dt.stride[1] = 1;
    op = {.u = u,
          .dt = dt,
          .A = A,
          .B = rows.slice(2, r, r + n),
          .C = rows.slice(2, r + n, r + 2 * n),
          .D = c.D ? D.view() : Tensor(),
          .dt_bias = c.dt_bias ? dt_bias.view() : Tensor(),
          .z = c.z ? z.view() : Tensor(),
          .seq_start = {},
          .state = state,
          .slot = c.slots ? slot.view() : Tensor(),
          .y = y,
          .saved = {},
          .dt_proj = dt_proj};
  }
  // Sums of dt that are not exact.
  void make_inexact() {
    Rng rng(6);
    x_dbl.normal(rng);
    dt_proj.normal(rng, 0.2);
  }
  bool guards_intact() const { return y.guards_intact() && state.guards_intact(); }
};

}  // namespace krait::step_test
