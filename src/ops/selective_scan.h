// Selective scan (Mamba, eq. 2a-2b with A_bar = exp(delta A) and B_bar = delta B), over packed
// sequences:
//   delta_t = softplus(dt_t + dt_bias),   h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   y_t =
//   (C_t h_t + D u_t) silu(z_t)
// Channel c uses group c / (d_inner / n_groups) of B and C. h starts from the sequence's state, or
// at zero. A state in bf16 is f32 while a pass works on it, and rounded to nearest even where the
// pass ends.
#pragma once

#include "ops/context.h"
#include "ops/cost.h"

namespace krait {

inline constexpr int64_t kMaxDState = 256;

// Rows of every (tokens, ..) tensor may be strided, and a row stride of 0 repeats one row: they are
// views into in_proj's and x_proj's outputs, or a constant in place of a selective parameter.
struct SelectiveScan {
  Tensor u, dt;       // (tokens, d_inner)            T; dt before bias and softplus
  Tensor A;           // (d_inner, d_state)           f32, -exp(A_log)
  Tensor B, C;        // (tokens, n_groups, d_state)  T
  Tensor D, dt_bias;  // (d_inner)                    f32; none: zero
  Tensor z;           // (tokens, d_inner)            T; none: no gate
  Tensor seq_start;   // (num_seqs + 1)               i32, from 0 to tokens, not decreasing
  Tensor state;  // (slots, d_inner, d_state)    f32 or bf16; in: initial, out: final; none: starts
                 // at zero, not kept
  Tensor slot;   // (num_seqs)                   i32, distinct; none: sequence i uses slot i
  Tensor y;      // (tokens, d_inner)            T
  Tensor saved;  // (selective_scan_saved_size)  f32, opaque: states at chunk starts, for _bwd of
                 // the same engine; none: not kept
  // (d_inner, dt_rank)  T, in _step only: dt is then (tokens, dt_rank), and T(dt dt_proj^T) takes
  // its place, the sums in f32.
  Tensor dt_proj = {};
  // In _step: A, D, dt_bias, dt_proj, slot and state are not written by the op queued right before,
  // so that an engine may read them before that one is done.
  bool settled = false;
  // In _fwd: how many of its kind run at once (Context::side_by_side), by which an engine plans.
  int beside = 1;
};

// B or C of one group, (tokens, d_state), as (tokens, 1, d_state); none stays none.
Tensor one_group(Tensor);

// _bwd reads the inputs of the op, op.saved when it is there (else it scans once more), and
// op.state, which holds the INITIAL state (as it was before _fwd), in f32. It does not read op.y,
// but gives it once more where it is wanted, so that nobody need keep it. Where an input has row
// stride 0, its gradient is given per token.
struct SelectiveScanGrad {
  Tensor dy;  // (tokens, d_inner)            T
  // (tokens, d_inner)  T; du may be dy itself, ddt op.dt (of distinct rows), so that neither takes
  // memory of its own
  Tensor du, ddt;
  Tensor dA;            // (d_inner, d_state)           f32, added to
  Tensor dB, dC;        // (tokens, n_groups, d_state)  T
  Tensor dD, ddt_bias;  // (d_inner)                    f32, added to; none where D, dt_bias are
  Tensor dz;            // (tokens, d_inner)            T; none when z is
  Tensor dstate;  // (slots, d_inner, d_state)    f32; in: gradient of the final state, out: of the
                  // initial one; none: zero, not wanted
  Tensor y;       // (tokens, d_inner)            T; written: what _fwd gave; none: not wanted
};

Cost selective_scan_cost(const SelectiveScan&);
// Elements of `saved` for a batch of this shape: O(tokens x d_inner) whatever the sequences'
// lengths.
int64_t selective_scan_saved_size(const Context&, int64_t tokens, int64_t d_inner, int64_t d_state);
// A pass through many layers may go by stages of so many tokens: each through a layer beside the
// stages behind it through the layers before. `tokens` where a layer's scan of all of them fills
// the engine as it is.
int64_t selective_scan_stage(Context&, int64_t tokens, int64_t num_seqs, int64_t d_inner,
                             int64_t d_state);
void selective_scan_fwd(Context&, const SelectiveScan&);
void selective_scan_bwd(Context&, const SelectiveScan&, const SelectiveScanGrad&);
// One token for each sequence: tokens = num_seqs, seq_start and saved are none, state is needed.
void selective_scan_step(Context&, const SelectiveScan&);

}  // namespace krait
