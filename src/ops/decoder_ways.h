// What the CUDA engine's ways for a decoder step have in common. Used by decoder_step_cuda.cu,
// decoder_batch_cuda.cu and decoder_cluster_cuda.cu only.
#pragma once

#include "ops/decoder_step.h"
#include "ops/decoder_step_plan.h"

namespace krait::cuda {

// The op has layers.
DecoderShape shape_of(const DecoderStep&);

// Whether the ways for many sequences may take it: their kernels are in code for exactly compute
// capability 9.0, with weights in bf16. What layers must be like each asks for itself.
bool many_possible(Context&, const DecoderStep&);

// Behind all layers, by the ops: logits = norm_f(r) head^T. residual: r, (num_seqs, d_model).
void decoder_logits(Context&, const DecoderStep&, const Tensor& residual);

}  // namespace krait::cuda
