// The CUDA engine's way for a decoder step of many sequences: four kernels a layer. Used by
// decoder_step_cuda.cu only.
#pragma once

#include "ops/decoder_step.h"

namespace krait::cuda {

// Of more than kDecoderMaxSeqs sequences, without batch_invariant.
bool takes_decoder_batch(Context&, const DecoderStep&);
void decoder_batch(Context&, const DecoderStep&);

}  // namespace krait::cuda
