// The kernel of a decoder step by clusters. Used by decoder_cluster_cuda.cu only.
#pragma once

#include "ops/cuda/state.h"
#include "ops/decoder_cluster.cuh"

namespace krait::cuda {

// Clusters of kClusterBlocks blocks that run at once on the current GPU.
int decoder_clusters_at_once(size_t shared_bytes);
void launch_decoder_cluster(const State&, const DecoderClusterArgs&, bool bf16_states);

}  // namespace krait::cuda
