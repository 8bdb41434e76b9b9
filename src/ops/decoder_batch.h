// The CUDA engine's way for a decoder step of many sequences: four kernels a layer. Used by
// decoder_step_cuda.cu and decoder_cluster_cuda.cu.
#pragma once

#include "ops/decoder_step.h"

namespace krait::cuda {

// Of more than kDecoderMaxSeqs sequences, without batch_invariant.
bool takes_decoder_batch(Context&, const DecoderStep&);
void decoder_batch(Context&, const DecoderStep&);

// Behind all layers, by the ops: logits = norm_f(r) head^T. residual: r, (num_seqs, d_model).
void decoder_logits(Context&, const DecoderStep&, const Tensor& residual);

}  // namespace krait::cuda
