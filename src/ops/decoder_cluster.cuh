// A decoder step by clusters: the kernel's arguments, a block's place in it, and its barriers. Only
// in code for exactly compute capability 9.0.
#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/mbarrier.cuh"
#include "ops/cuda/tensor_map.h"
#include "ops/cuda/tile_copy.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/decoder_cluster_plan.h"

namespace krait::cuda {

struct DecoderClusterLayer {
  CUtensorMap in_proj, x_proj, dt_proj, out_proj;  // tiles of what a block owns
  const float *norm, *in_bias, *conv_weight, *conv_bias, *dt_bias, *A, *D, *out_bias;
  void *conv, *ssm;
};

struct DecoderClusterArgs {
  DecoderClusterLayer layer[kClusterMaxLayers];
  DecoderClusterPlan cut;
  int n_layer, num_seqs;
  const int32_t *tokens, *slot;  // slot: null: sequence i has slot i
  const bf16* embedding;
  void* residual;  // (num_seqs, d_model), written at the end
  float eps, per_d_model;
  bool residual_f32;
};
static_assert(sizeof(DecoderClusterArgs) <= 32764);  // what arguments of a launch may take

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Vectors that products multiply lie on chip as the tensor cores take them without a swizzle: eight
// sequences' runs of eight elements each, 128 bytes, behind one another along the elements, then
// the next eight sequences.
__device__ __forceinline__ int vector_place(int width, int seq, int i) {
  return (seq >> 3) * width * 8 + (i >> 3) * 64 + (seq & 7) * 8 + (i & 7);
}
// x_dbl, and the parts of its sums, the other way round: along the sequences first, so that any
// runs of eight rows can be sent as one.
__device__ __forceinline__ int x_dbl_place(int seqs, int seq, int row) {
  return (row >> 3) * seqs * 8 + seq * 8 + (row & 7);
}

// Goes through the ring's stages.
struct ClusterStage {
  int s = 0;
  uint32_t turn = 0;  // how often the stage was filled before

  __device__ void next(int stages) {
    if (++s == stages) s = 0, ++turn;
  }
};

// A block of a cluster. What blocks send each other arrives at the same place in each, and at a
// barrier of the receiver's, which also hears of the block's own part. A place is free again
// before anybody sends to it: who sends for the next layer has received what every block
// sent behind its reading; of y's, where other things lie before, every block tells. That what a
// block sends has left it shows only in what it receives of all who needed it: until then it lies
// where nothing else is written (x_sent, y_sent).
template <int kSeqs>
struct ClusterBlock {
  static constexpr int kMaxOctets = kSeqs / kClusterOctet;
  static constexpr int kSums = kSeqs / 2;  // of a thread, for 64 rows

  const DecoderClusterArgs& a;
  const DecoderClusterPlan& cut;
  int rank, seq0, seqs, octets;
  char* memory;
  uint32_t memory_at;

  __device__ ClusterBlock(const DecoderClusterArgs& args, char* dynamic)
      : a(args),
        cut(args.cut),
        rank(static_cast<int>(cooperative_groups::this_cluster().block_rank())) {
    const int cluster = static_cast<int>(blockIdx.x) / kClusterBlocks;
    seq0 = cluster * a.num_seqs / cut.clusters;
    seqs = (cluster + 1) * a.num_seqs / cut.clusters - seq0;
    octets = (seqs + kClusterOctet - 1) / kClusterOctet;
    const uint32_t start = shared_address(dynamic);
    memory_at = (start + kClusterAlignment - 1) / kClusterAlignment * kClusterAlignment;
    memory = dynamic + (memory_at - start);
    // Else these are found anew wherever they are needed.
    asm volatile("" : "+r"(rank), "+r"(seq0), "+r"(seqs), "+r"(octets), "+r"(memory_at));
  }

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  // The same for the whole warp, as the compiler sees it, too.
  __device__ static int group() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0); }

  template <class T>
  __device__ T* at(int offset) const {
    return reinterpret_cast<T*>(memory + offset);
  }
  __device__ uint32_t address(int offset) const {
    return memory_at + static_cast<uint32_t>(offset);
  }

  __device__ uint32_t stage(int s) const { return address(s * cut.stage_bytes); }
  __device__ uint32_t full(int s) const { return address(cut.shared.barriers + 8 * s); }
  __device__ uint32_t empty(int s) const { return full(kClusterMaxStages + s); }
  // Here from all blocks: x with the squares, the parts of x_dbl's sums, x_dbl, y.
  __device__ uint32_t x_full() const { return full(2 * kClusterMaxStages); }
  __device__ uint32_t received_full() const { return full(2 * kClusterMaxStages + 1); }
  __device__ uint32_t x_dbl_full() const { return full(2 * kClusterMaxStages + 2); }
  __device__ uint32_t y_full() const { return full(2 * kClusterMaxStages + 3); }
  // The block's own part may be sent: every computing warp has written its share.
  __device__ uint32_t x_ready() const { return full(2 * kClusterMaxStages + 4); }
  __device__ uint32_t parts_ready() const { return full(2 * kClusterMaxStages + 5); }
  // 1 / sqrt(mean(r^2)) of each sequence is there.
  __device__ uint32_t scales_ready() const { return full(2 * kClusterMaxStages + 6); }
  // The block needs nothing more of what lies in y's place; nor does any block: y may be sent.
  __device__ uint32_t place_left() const { return full(2 * kClusterMaxStages + 7); }
  __device__ uint32_t place_free() const { return full(2 * kClusterMaxStages + 8); }
  __device__ uint32_t y_ready(int octet) const { return full(2 * kClusterMaxStages + 9 + octet); }

  // One thread; then the cluster meets.
  __device__ void init_barriers() const {
    for (int s = 0; s < cut.stages; ++s) {
      init_mbarrier(full(s), 1);
      init_mbarrier(empty(s), kClusterCopyWarp);
    }
    for (const uint32_t barrier : {received_full(), x_dbl_full()}) init_mbarrier(barrier, 1);
    for (const uint32_t barrier : {x_full(), scales_ready(), y_full()})
      init_mbarrier(barrier, octets);
    for (const uint32_t barrier : {x_ready(), parts_ready(), place_left()})
      init_mbarrier(barrier, kClusterCopyWarp);
    init_mbarrier(place_free(), kClusterBlocks);
    for (int octet = 0; octet < kMaxOctets; ++octet)
      init_mbarrier(y_ready(octet), kClusterCopyWarp);
    publish_mbarriers();
  }

  // The states of the block's channels, of slot 0; then those of a sequence, from slot 0's.
  template <class S>
  __device__ S* ssm(const DecoderClusterLayer& layer) const {
    return static_cast<S*>(layer.ssm) + rank * cut.channels * kClusterStates;
  }
  template <class S>
  __device__ S* ssm_of(S* states, int seq) const {
    return of_slot(states, seq, cut.d_inner * kClusterStates);
  }
  template <class S>
  __device__ S* conv(const DecoderClusterLayer& layer) const {
    return static_cast<S*>(layer.conv) + rank * cut.channels;
  }
  template <class S>
  __device__ S* conv_of(S* states, int seq) const {
    return of_slot(states, seq, cut.d_inner * kClusterBefore);
  }
  // In bytes, for which one instruction does.
  template <class S>
  __device__ S* of_slot(S* states, int seq, int elements) const {
    using Bytes = std::conditional_t<std::is_const_v<S>, const char, char>;
    return reinterpret_cast<S*>(reinterpret_cast<Bytes*>(states) +
                                int64_t{at<int>(cut.shared.slots)[seq]} *
                                    (elements * static_cast<int>(sizeof(S))));
  }
};

#endif

}  // namespace krait::cuda
