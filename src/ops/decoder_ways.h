// The CUDA engine's ways for a decoder step (decoder_step.h), and what they have in common. Used by
// the files of these ways only.
#pragma once

#include <vector>

#include "ops/decoder_step.h"
#include "ops/decoder_step_plan.h"

namespace krait::cuda {

// The most sequences that a way takes at a time of a model that has layers, and any number below;
// 0: not this model. That does not look at how many there are, nor do a sequence's bits depend on
// it. There is at least one.
// Few, by one persistent kernel, which is another one for one (and takes it alone).
int64_t persistent_takes(Context&, const DecoderStep&);
void decoder_persistent(Context&, const DecoderStep&);
// Many through a small model: one kernel, in which each cluster of blocks carries its own sequences
// through all layers.
int64_t clusters_take(Context&, const DecoderStep&);
void decoder_cluster(Context&, const DecoderStep&);
// Many: four kernels a layer.
int64_t batch_takes(Context&, const DecoderStep&);
void decoder_batch(Context&, const DecoderStep&);

// A step for some of the op's sequences: [begin, end). `layers` keeps what the part needs of its
// own: where sequences are their own slots, states from the first one's on.
DecoderStep part_of(const DecoderStep&, int64_t begin, int64_t end,
                    std::vector<DecoderLayer>& layers);

// The op has layers.
DecoderShape shape_of(const DecoderStep&);

// Whether the ways for many sequences may take it: their kernels are in code for exactly compute
// capability 9.0, with weights in bf16. What layers must be like each asks for itself.
bool many_possible(Context&, const DecoderStep&);

// Behind all layers, by the ops: logits = norm_f(r) head^T. residual: r, (num_seqs, d_model).
void decoder_logits(Context&, const DecoderStep&, const Tensor& residual);

}  // namespace krait::cuda
