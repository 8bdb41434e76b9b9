// The kernels of a decoder step of many sequences. Used by decoder_batch_cuda.cu only.
#pragma once

#include "core/dtype.h"
#include "ops/cuda/state.h"
#include "ops/decoder_batch_plan.h"

namespace krait::cuda {

// Of the current GPU.
DecoderBatchMachine decoder_batch_machine();

// A norm in two halves: whoever makes the residual stream r leaves T(r weight) and sums of r^2 for
// each tile of r; whoever multiplies it with a matrix divides the sums by the root of their mean.
struct DecoderBatchSquares {
  float* sums;  // (tiles, kDecoderBatchMaxSeqs)
  int tiles;
};

// x, z = in_proj(norm(r));  u = conv(x), which shifts x into the convolution's state.
struct DecoderBatchIn {
  DecoderBatchSquares squares;
  float eps, per_d_model;
  const float *bias, *conv_weight, *conv_bias;  // bias, conv_bias: null when none
  void* conv;                                   // (slots, 3, d_inner)
  const int32_t* slot;                          // null: sequence i has slot i
  bool bf16_states;
  bf16 *u, *z;  // (num_seqs, d_inner)
};
// weight: (2 d_inner, d_model); x: (num_seqs, d_model)
void launch_decoder_batch_in(const State&, const DecoderBatchProduct&, const DecoderBatchIn&,
                             const Tensor& weight, const Tensor& x);

// r += out_proj(y); then the first half of a norm.
struct DecoderBatchOut {
  const float* bias;  // null when none
  void* residual;     // (num_seqs, d_model)
  bool residual_f32;
  const float* norm;  // (d_model)
  bf16* x;            // (num_seqs, d_model)
  float* squares;     // (tiles, kDecoderBatchMaxSeqs)
};
// weight: (d_model, d_inner); y: (num_seqs, d_inner)
void launch_decoder_batch_out(const State&, const DecoderBatchProduct&, const DecoderBatchOut&,
                              const Tensor& weight, const Tensor& y);

}  // namespace krait::cuda
