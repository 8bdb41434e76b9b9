// The kernel of a decoder step by clusters, for exactly compute capability 9.0.
#include "ops/cuda/dependent_launch.cuh"
#include "ops/decoder_cluster_kernel.h"
#include "ops/decoder_cluster_thread.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = kClusterAllThreads;

// Grid: clusters of kClusterBlocks blocks, all of them at once, each with sequences of its own
// (decoder_cluster_plan.h). A block owns channels and outputs of every layer and reads its part of
// the weights once, from the L2 cache when another cluster was there before: one warp copies them
// and the states into a ring of stages, past everything that is awaited. Products go through the
// tensor cores, sequences along their columns. u never leaves its block: x_proj is multiplied by
// parts of its inputs, and in_proj by halves: z's waits until those parts are on their way. The
// blocks of a cluster exchange x (bf16(r norm), with sums of r^2, by whose mean in_proj's sums are
// divided), the parts of x_dbl's sums, x_dbl, and y, eight sequences at a time while the others are
// scanned: all of it from shared memory to shared memory. Numerics: sums in f32, of out_proj by
// warpgroups, then in order; of x_proj by blocks, then in order; rounded to bf16 where the ops'
// outputs are.
template <int kSeqs, class S>
__global__ void __launch_bounds__(kThreads, 1)
    decoder_cluster_layers(const __grid_constant__ DecoderClusterArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  decoder_cluster_thread<kSeqs, S>(args, memory);
#endif
}

template <class S>
auto kernel_for(int seqs) {
  return seqs == 8    ? decoder_cluster_layers<8, S>
         : seqs == 16 ? decoder_cluster_layers<16, S>
                      : decoder_cluster_layers<24, S>;
}

}  // namespace

int decoder_clusters_at_once(size_t shared_bytes) {
  return clusters_at_once(
      kernel_for<float>(kClusterMaxSeqs),
      {.grid = {}, .block = kThreads, .shared_bytes = shared_bytes, .cluster = kClusterBlocks});
}

void launch_decoder_cluster(const State& gpu, const DecoderClusterArgs& args, bool bf16_states) {
  const auto launch = [&](auto kernel) {
    const auto shared_bytes = static_cast<size_t>(args.cut.shared.bytes) + kClusterAlignment;
    allow(kernel, shared_bytes, kClusterBlocks);
    launch_dependent(gpu, "decoder_cluster_layers", kernel,
                     {.grid = dim3(static_cast<unsigned>(args.cut.clusters * kClusterBlocks)),
                      .block = kThreads,
                      .shared_bytes = shared_bytes,
                      .cluster = kClusterBlocks},
                     args);
  };
  bf16_states ? launch(kernel_for<bf16>(args.cut.seqs)) : launch(kernel_for<float>(args.cut.seqs));
}

}  // namespace krait::cuda
