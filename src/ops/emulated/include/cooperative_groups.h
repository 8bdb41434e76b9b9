#pragma once

#include "cuda_words.h"
#include "ops/decoder_cluster_plan.h"

namespace cooperative_groups {

struct EmulatedCluster {
  unsigned block_rank() const { return blockIdx.x % krait::cuda::kClusterBlocks; }
};
inline EmulatedCluster this_cluster() { return {}; }

}  // namespace cooperative_groups
