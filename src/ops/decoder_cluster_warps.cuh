// What the computing warps of a block have in common in a decoder step by clusters: how they meet,
// take stages out of the ring, and multiply them.
#pragma once

#include "ops/cuda/wgmma.cuh"
#include "ops/decoder_cluster.cuh"

namespace krait::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of four neighbouring columns of `width` for a thread: those of every at_once-th sequence.
struct ClusterFour {
  int column, first, at_once;

  __device__ ClusterFour(int thread, int width, int none) {
    const int columns = width / 4;
    column = thread % columns * 4;
    at_once = kClusterThreads / columns;
    first = thread / columns;
    if (first >= at_once) first = none;
  }
};

template <int kSeqs>
class ClusterWarps {
 public:
  static constexpr int kSums = ClusterBlock<kSeqs>::kSums;

  const ClusterBlock<kSeqs>& block;
  const DecoderClusterPlan& cut;
  const int thread, group;

  __device__ explicit ClusterWarps(const ClusterBlock<kSeqs>& of)
      : block(of),
        cut(of.cut),
        thread(static_cast<int>(threadIdx.x)),
        group(ClusterBlock<kSeqs>::group()) {}

  // The same for the whole warp, as the compiler sees it, too.
  __device__ static int warp() { return __shfl_sync(~0u, ClusterBlock<kSeqs>::warp(), 0); }

  __device__ ClusterFour four_of(int width) const { return {thread, width, kSeqs}; }

  __device__ static void meet() { meet_first<kClusterThreads>(); }
  // What the warp wrote to shared memory may be sent, or written over: by a warp that publishes it
  // to copies for all who wrote it. (Here, each would wait for its stores to memory, too.)
  __device__ static void tell(uint32_t barrier) {
    __syncwarp();
    if (ClusterBlock<kSeqs>::lane() == 0) arrive(barrier);
  }

  __device__ uint32_t await_stage() const {
    wait_for_phase(block.full(at_.s), at_.turn);
    return block.stage(at_.s);
  }
  __device__ void leave_stage() {
    __syncwarp();
    if (ClusterBlock<kSeqs>::lane() == 0) arrive(block.empty(at_.s));
    at_.next(cut.stages);
  }
  // A matrix's `rows` rows, each tile of which one warpgroup multiplies, over steps of kClusterTile
  // inputs, each in a stage of its own or all in one: multiply(d, stage, step, tile) starts a
  // step's products, keep(d, t, tile) gets the sums of a warpgroup's tile number t.
  template <class Multiply, class Keep>
  __device__ void product(int rows, int steps, bool one_stage, const Multiply& multiply,
                          const Keep& keep) {
    static_assert(kClusterTiles == 2);
    const int tiles = (rows + kClusterTile - 1) / kClusterTile;
    if (group + kClusterGroups < tiles)
      product_of<2>(steps, one_stage, multiply, keep);
    else if (group < tiles)
      product_of<1>(steps, one_stage, multiply, keep);
    else
      pass(one_stage ? 1 : steps);
  }
  // A stage is handed back as soon as its products are done: the ring is short of stages rather
  // than the tensor cores of work. (That these loops hold nothing else that depends on the shape
  // lets the compiler see which registers products are adding to.)
  template <int kTiles, class Multiply, class Keep>
  __device__ void product_of(int steps, bool one_stage, const Multiply& multiply,
                             const Keep& keep) {
    float d[kTiles][kSums] = {};
    uint32_t stage = 0;
    for (int step = 0; step < steps; ++step) {
      if (step == 0 || !one_stage) stage = await_stage();
      begin_products();
#pragma unroll
      for (int t = 0; t < kTiles; ++t) multiply(d[t], stage, step, group + t * kClusterGroups);
      end_products();
      wait_for_products<0>();
      if (!one_stage || step + 1 == steps) leave_stage();
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      settle(d[t]);
      keep(d[t], t, group + t * kClusterGroups);
    }
  }
  // Of one tile, by warpgroups in turn: multiply(stage, i) starts stage number i's products.
  template <class Multiply>
  __device__ void product_in_turn(float (&d)[kSums], int stages, const Multiply& multiply) {
    pass(min(group, stages));
    for (int i = group; i < stages; i += kClusterGroups) {
      const uint32_t stage = await_stage();
      begin_products();
      multiply(stage, i);
      end_products();
      wait_for_products<0>();
      leave_stage();
      pass(min(kClusterGroups - 1, stages - 1 - i));
    }
    settle(d);
  }
  // A step of inputs of vectors: a tile of the matrix times their elements from step kClusterTile
  // on.
  __device__ static void multiply_step(float (&d)[kSums], uint64_t tile, uint64_t vectors,
                                       int step) {
    vectors = behind(vectors, static_cast<uint32_t>(step * kClusterTile));
#pragma unroll
    for (uint32_t k = 0; k < kClusterTile; k += 16)
      multiply_tiles(d, behind(tile, k / 8), behind(vectors, k));
  }
  // Stages that this warpgroup has nothing to do with.
  __device__ void pass(int stages) {
    for (int i = 0; i < stages; ++i) {
      await_stage();
      leave_stage();
    }
  }
  // Row and sequence of a thread's sum number i of a tile.
  __device__ static int row_of(int i) {
    return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + ClusterBlock<kSeqs>::lane() / 4 +
           i % 4 / 2 * 8;
  }
  __device__ static int seq_of(int i) {
    return i / 4 * 8 + ClusterBlock<kSeqs>::lane() % 4 * 2 + i % 2;
  }
  // body(t, tile) for each tile of `rows` rows that this warpgroup multiplies.
  template <class Body>
  __device__ void for_tiles(int rows, const Body& body) const {
#pragma unroll
    for (int t = 0; t < kClusterTiles; ++t)
      if (const int tile = group + t * kClusterGroups; tile * kClusterTile < rows) body(t, tile);
  }
  // A tile of a stage that holds `rows` rows of a matrix for each step of inputs.
  __device__ static uint32_t tile_at(uint32_t stage, int step, int rows, int tile) {
    return stage + static_cast<uint32_t>((step * rows + tile * kClusterTile) * kTileBytes);
  }

 private:
  ClusterStage at_;
};

#endif

}  // namespace krait::cuda
