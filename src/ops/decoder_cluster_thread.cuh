// A thread of a decoder step by clusters: the kernel's body.
#pragma once

#include "ops/cuda/dependent_launch.cuh"
#include "ops/decoder_cluster_copies.cuh"
#include "ops/decoder_cluster_layer.cuh"

namespace krait::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// memory: the block's dynamic shared memory. S: of states.
template <int kSeqs, class S>
__device__ __forceinline__ void decoder_cluster_thread(const DecoderClusterArgs& args,
                                                       char* memory) {
  const ClusterBlock<kSeqs> block(args, memory);
  if (threadIdx.x == 0) block.init_barriers();
  wait_for_earlier_work();
  if (const int seq = static_cast<int>(threadIdx.x); seq < block.seqs)
    block.template at<int>(args.cut.shared.slots)[seq] =
        args.slot ? args.slot[block.seq0 + seq] : block.seq0 + seq;
  __syncthreads();  // the slots are there
  arrive_in_cluster();
  wait_for_cluster();  // the barriers are there
  if (block.warp() == kClusterCopyWarp) {
    if (elect_one()) ClusterStream<kSeqs, S>(block).run();
  } else if (block.warp() > kClusterCopyWarp) {
    ClusterSender<kSeqs>(block, block.warp() - kClusterCopyWarp - 1).run();
  } else {
    ClusterLayers<kSeqs, S>(block).run();
  }
  __syncwarp();
  arrive_in_cluster();
  wait_for_cluster();  // what was sent to or by this block has arrived
}

#endif

}  // namespace krait::cuda
