// The products of a decoder step of many sequences, as sums^T = matrix vectors^T by Hopper's tensor
// cores: the matrix streams through the blocks once, from before the work before the kernel is
// done. Only in code for exactly compute capability 9.0.
#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/dependent_launch.cuh"
#include "ops/cuda/mbarrier.cuh"
#include "ops/cuda/tensor_map.h"
#include "ops/cuda/tile_copy.cuh"
#include "ops/cuda/wgmma.cuh"
#include "ops/decoder_batch_plan.h"

namespace krait::cuda {

static_assert(kDecoderBatchStep * 2 == kTileBytes);  // a tile's row is a step of inputs

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The stages of one operand, and barriers for each: it is full, it is empty.
struct BatchRing {
  uint32_t memory, barriers;
  int stages, stage_bytes;

  __device__ uint32_t tile(int s) const { return memory + static_cast<uint32_t>(s * stage_bytes); }
  __device__ uint32_t full(int s) const { return barriers + 8 * static_cast<uint32_t>(s); }
  __device__ uint32_t empty(int s) const { return full(kDecoderBatchMaxStages + s); }
};

// Goes through a ring's stages.
struct BatchStage {
  int s = 0;
  uint32_t turn = 0;  // how often the stage was filled before

  __device__ void next(const BatchRing& ring) {
    if (++s == ring.stages) s = 0, ++turn;
  }
};

// A block's place in the product. kSeqs: of the tile; kGroups: warpgroups, each for
// kDecoderBatchGroup rows. Behind these one more warp copies, and another does what the kernel has
// to do besides.
template <int kSeqs, int kGroups>
struct BatchProduct {
  static constexpr int kStep = kDecoderBatchStep, kRows = kDecoderBatchGroup * kGroups;
  static constexpr int kPitch = kRows + kDecoderBatchGap, kThreads = 128 * kGroups + 64;
  static constexpr int kCopyWarp = 4 * kGroups, kSideWarp = kCopyWarp + 1;
  static constexpr int kSums = kSeqs / 2;  // of a thread

  const DecoderBatchProduct& cut;
  int part, row0, first_step, steps;
  int seq0, seqs;  // that this block finishes
  BatchRing weights, vectors;
  // Where the rings were, at the end: the block's sums (kSeqs, kPitch), then what the other parts'
  // blocks sent.
  float* sums;
  uint32_t sums_at, sent_at, sent_bytes, sent_full;
  char* states;  // (own sequences, box_rows, state_bytes), in an order of the kernel's
  // For each of the block's sequences, for the kernel's use.
  float* scale;
  int* slot;

  __device__ BatchProduct(const DecoderBatchProduct& c, char* memory)
      : cut(c),
        part(static_cast<int>(cooperative_groups::this_cluster().block_rank())),
        row0(static_cast<int>(blockIdx.x) / c.split * c.box_rows) {
    first_step = part * c.steps / c.split;
    steps = (part + 1) * c.steps / c.split - first_step;
    seq0 = first_seq(part);
    seqs = first_seq(part + 1) - seq0;
    const int own_seqs = (c.num_seqs + c.split - 1) / c.split;
    const uint32_t start = shared_address(memory);
    sums_at =
        (start + kDecoderBatchAlignment - 1) / kDecoderBatchAlignment * kDecoderBatchAlignment;
    sums = reinterpret_cast<float*>(memory + (sums_at - start));
    sent_bytes = static_cast<uint32_t>(own_seqs * kPitch * 4);  // by one block
    sent_at = sums_at + kSeqs * kPitch * 4;
    weights = {sums_at, 0, c.weight_stages, c.boxes * c.box_rows * kTileBytes};
    vectors = {weights.tile(c.weight_stages), 0, c.vector_stages, kSeqs * kTileBytes};
    const uint32_t rings_end =
        max(vectors.tile(c.vector_stages), weights.tile(c.weight_stages - 1) + kRows * kTileBytes);
    const uint32_t states_at = max(rings_end, sent_at + (c.split - 1) * sent_bytes);
    states = memory + (states_at - start);
    const uint32_t barriers =
        states_at + static_cast<uint32_t>(own_seqs * c.box_rows * c.state_bytes);
    weights.barriers = barriers;
    vectors.barriers = barriers + 16 * kDecoderBatchMaxStages;
    sent_full = barriers + 32 * kDecoderBatchMaxStages;
    scale = reinterpret_cast<float*>(memory + (sent_full + 16 - start));
    slot = reinterpret_cast<int*>(scale + own_seqs);
  }

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ int first_seq(int of) const { return cut.num_seqs * of / cut.split; }

  // Every thread; then the block meets.
  __device__ void init(const CUtensorMap& weight_map, const CUtensorMap& vector_map) const {
    if (warp() == 0) init_barriers();
    if (threadIdx.x == 32 * kCopyWarp) prefetch_map(weight_map), prefetch_map(vector_map);
  }
  __device__ void init_barriers() const {
    for (const BatchRing* ring : {&weights, &vectors})
      if (lane() < ring->stages) {
        init_mbarrier(ring->full(lane()), 1);
        init_mbarrier(ring->empty(lane()), 4 * kGroups);
      }
    if (lane() == 0) {
      init_mbarrier(sent_full, 1);
      arrive_and_expect(sent_full, (cut.split - 1) * seqs * kPitch * 4);
    }
    publish_mbarriers();
  }

  // One thread: the operands of the block's step number `step` into a stage.
  __device__ void copy_weights(const CUtensorMap& map, int s, int step) const {
    arrive_and_expect(weights.full(s), weights.stage_bytes);
    for (int box = 0; box < cut.boxes; ++box)
      copy_tile_once(weights.tile(s) + static_cast<uint32_t>(box * cut.box_rows * kTileBytes), map,
                     row0 + box * cut.rows, (first_step + step) * kStep, weights.full(s));
  }
  __device__ void copy_vectors(const CUtensorMap& map, int s, int step) const {
    arrive_and_expect(vectors.full(s), vectors.stage_bytes);
    copy_tile(vectors.tile(s), map, 0, (first_step + step) * kStep, vectors.full(s));
  }

  // The copying warp, before the vectors are there: the first steps' weights.
  __device__ void start(const CUtensorMap& map) const {
    if (lane() == 0)
      for (int s = 0; s < min(weights.stages, steps); ++s) copy_weights(map, s, s);
    __syncwarp();
  }
  // Then: the rest.
  __device__ void stream(const CUtensorMap& weight_map, const CUtensorMap& vector_map) const {
    if (lane() == 0) stream_by_one(weight_map, vector_map);
    __syncwarp();
  }
  __device__ void stream_by_one(const CUtensorMap& weight_map,
                                const CUtensorMap& vector_map) const {
    for (int s = 0; s < min(vectors.stages, steps); ++s) copy_vectors(vector_map, s, s);
    BatchStage w, v;
    for (int step = 0; step < steps; ++step) {
      if (step + weights.stages < steps) {
        wait_for_phase(weights.empty(w.s), w.turn);
        copy_weights(weight_map, w.s, step + weights.stages);
        w.next(weights);
      }
      if (step + vectors.stages < steps) {
        wait_for_phase(vectors.empty(v.s), v.turn);
        copy_vectors(vector_map, v.s, step + vectors.stages);
        v.next(vectors);
      }
    }
  }

  // A warpgroup's products. Hands a step's stages back when the next step's products are on their
  // way.
  __device__ void multiply(float (&d)[kSums], int group) const {
    BatchStage w, v;
    int last_w = 0, last_v = 0;
    for (int step = 0; step < steps; ++step) {
      wait_for_phase(weights.full(w.s), w.turn);
      wait_for_phase(vectors.full(v.s), v.turn);
      const uint64_t a = tile_descriptor(
          weights.tile(w.s) + static_cast<uint32_t>(group * kDecoderBatchGroup * kTileBytes));
      const uint64_t b = tile_descriptor(vectors.tile(v.s));
      begin_products();
#pragma unroll
      for (int k = 0; k < kStep; k += 16) multiply_tiles(d, a + k / 8, b + k / 8);
      end_products();
      wait_for_products<1>();
      if (step > 0 && lane() == 0) arrive(weights.empty(last_w)), arrive(vectors.empty(last_v));
      last_w = w.s, last_v = v.s;
      w.next(weights), v.next(vectors);
    }
    wait_for_products<0>();
#pragma unroll
    for (float& sum : d) asm volatile("" : "+f"(sum)::"memory");
  }

  // sums[seq][row] of a warp.
  __device__ void keep(const float (&d)[kSums]) const {
    const int g = lane() / 4, q = lane() % 4;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int row = warp() * 16 + g + i % 4 / 2 * 8, seq = i / 4 * 8 + 2 * q + i % 2;
      sums[seq * kPitch + row] = d[i];
    }
  }

  // One warp: this part's sums to the blocks that finish them.
  __device__ void send() const {
    const int to = lane();
    if (to >= cut.split || to == part) return;
    const int count = first_seq(to + 1) - first_seq(to);
    if (count == 0) return;
    const int place = part < to ? part : part - 1;
    copy_to_block(to, sent_at + static_cast<uint32_t>(place) * sent_bytes,
                  sums_at + static_cast<uint32_t>(first_seq(to) * kPitch * 4), count * kPitch * 4,
                  sent_full);
  }

  // Every thread, behind its products or copies: until all parts' sums of the block's sequences are
  // there.
  __device__ void exchange(const float (&d)[kSums]) const {
    __syncthreads();  // all stages have been read
    if (cut.split > 1) arrive_in_cluster();
    if (warp() < kCopyWarp) keep(d);
    publish_to_copies();
    __syncthreads();  // all sums are there
    if (cut.split == 1) return;
    wait_for_cluster();  // the others have read their stages
    if (warp() == 0) send();
    wait_for_phase(sent_full, 0);
    arrive_in_cluster();  // what was sent to this block has left the others
  }

  // Four neighbouring rows' sums of one of the block's sequences: the parts' in their order.
  __device__ Floats<4> total(int seq, int row) const {
    const float* const own = sums + (seq0 + seq) * kPitch + row;
    const float* const sent = sums + kSeqs * kPitch + seq * kPitch + row;
    Floats<4> sum{};
#pragma unroll 4
    for (int of = 0; of < cut.split; ++of) {
      const int place = of < part ? of : of - 1;
      const Floats<4> more =
          load_vector<4>(of == part ? own : sent + place * static_cast<int>(sent_bytes / 4));
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] = of == 0 ? more[k] : sum[k] + more[k];
    }
    return sum;
  }

  // Every thread, at the end: until what this block sent has left it.
  __device__ void part_from_cluster() const {
    if (cut.split > 1) wait_for_cluster();
  }
};

// A thread's part of what a block finishes: four neighbouring rows of the matrix (of a box), of
// every at_once-th of the block's sequences from the first on.
struct BatchShare {
  int column, row;  // in the block's box, in all
  int first, at_once;
  bool there;

  template <class Product>
  __device__ explicit BatchShare(const Product& product) {
    const int columns = product.cut.box_rows / 4, thread = static_cast<int>(threadIdx.x);
    at_once = Product::kThreads / columns;
    column = thread % columns * 4;
    row = product.row0 + column;
    first = thread / columns;
    there = first < at_once && row < product.cut.rows;
  }
};

#endif

// The kernel for a plan's sequences and groups: kernel(kSeqs, kGroups), of integral constants.
template <class Kernels>
auto kernel_of(const DecoderBatchProduct& plan, Kernels kernel) {
  const auto of = [&](auto seqs) {
    return plan.groups == 1 ? kernel(seqs, std::integral_constant<int, 1>())
                            : kernel(seqs, std::integral_constant<int, 2>());
  };
  return plan.seqs == 8    ? of(std::integral_constant<int, 8>())
         : plan.seqs == 16 ? of(std::integral_constant<int, 16>())
         : plan.seqs == 32 ? of(std::integral_constant<int, 32>())
         : plan.seqs == 64 ? of(std::integral_constant<int, 64>())
                           : of(std::integral_constant<int, 128>());
}

// weights: (.., inputs); vectors: (num_seqs, inputs).
template <class Kernel, class Args>
void launch_batch_product(const State& gpu, const char* name, Kernel kernel,
                          const DecoderBatchProduct& plan, const Tensor& weights,
                          const Tensor& vectors, const Args& args) {
  allow(kernel, kDecoderBatchSharedBytes, static_cast<unsigned>(plan.split));
  launch_dependent(gpu, name, kernel,
                   {.grid = dim3(static_cast<unsigned>(plan.blocks())),
                    .block = static_cast<unsigned>(plan.threads()),
                    .shared_bytes = static_cast<size_t>(plan.shared_bytes()),
                    .cluster = static_cast<unsigned>(plan.split)},
                   tensor_map(weights, plan.box_rows), tensor_map(vectors, plan.seqs), plan, args);
}

}  // namespace krait::cuda
