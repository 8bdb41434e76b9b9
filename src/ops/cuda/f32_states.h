// States in bf16 for passes over sequences, whose kernels know them in f32: a pass reads and writes
// states once, however long its sequences are.
#pragma once

#include "ops/context.h"

namespace krait::cuda {

// Between the slots of a pool in bf16 and rows (num_seqs, ..) in f32, one for each sequence; to the
// pool rounded to nearest even. slot: none: sequence i uses slot i.
void launch_widen_states(Context&, const Tensor& pool, const Tensor& slot, const Tensor& rows);
void launch_round_states(Context&, const Tensor& rows, const Tensor& slot, const Tensor& pool);

// pass(ctx, op) with op.state in f32.
template <class Op>
void with_f32_states(Context& ctx, const Op& op, void (*pass)(Context&, const Op&)) {
  const Arena::Scope scope(ctx.workspace());
  Op in_f32 = op;
  in_f32.slot = {};
  in_f32.state = ctx.workspace().tensor(
      DType::f32, {op.seq_start.shape[0] - 1, op.state.shape[1], op.state.shape[2]});
  launch_widen_states(ctx, op.state, op.slot, in_f32.state);
  pass(ctx, in_f32);
  launch_round_states(ctx, in_f32.state, op.slot, op.state);
}

}  // namespace krait::cuda
