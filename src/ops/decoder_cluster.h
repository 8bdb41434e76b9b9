// The CUDA engine's way for a decoder step of many sequences through a small model: one kernel, in
// which each cluster of blocks carries its own sequences through all layers. Used by
// decoder_step_cuda.cu only.
#pragma once

#include "ops/decoder_step.h"

namespace krait::cuda {

// Of more than kDecoderMaxSeqs sequences, without batch_invariant.
bool takes_decoder_cluster(Context&, const DecoderStep&);
void decoder_cluster(Context&, const DecoderStep&);

}  // namespace krait::cuda
