// linear_tiles: y = x weight^T in bf16 by Hopper's tensor cores, for any number of rows, of which
// each is summed in the same order: products that do not depend on a batch.
#include "ops/cuda/async_copy.cuh"
#include "ops/cuda/dependent_launch.cuh"
#include "ops/cuda/mbarrier.cuh"
#include "ops/cuda/tensor_map.h"
#include "ops/cuda/tile_copy.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/cuda/wgmma.cuh"
#include "ops/linear_kernels.h"
#include "ops/linear_plan.h"

namespace krait::cuda {
namespace {

using Plan = LinearTilesPlan;

struct Arguments {
  void* y;
  int64_t y_stride;
  const float *scale, *bias;  // of an output; null: 1, 0
  int tokens, in, out;
  int token_tiles, output_tiles, stages;
  bool vectors;  // y's rows can be written 16 bytes at a time
  bool settled;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

static_assert(Plan::kStep * 2 == kTileBytes);

// A block's tile: kTokens rows of x, kGroups warpgroups' outputs.
template <int kTokens, int kGroups>
struct Tile {
  static constexpr int kOutputs = Plan::kGroup * kGroups;
  static constexpr int kWeightBytes = kOutputs * kTileBytes, kXBytes = kTokens * kTileBytes;
  static constexpr int kStageBytes = kWeightBytes + kXBytes;
  static constexpr int kConsumers = 128 * kGroups, kCopyWarp = 4 * kGroups;
  static constexpr int kPitch = kOutputs + 8;  // of a token's outputs on chip: no bank conflicts

  const Arguments& p;
  uint32_t ring, barriers;
  int token0, output0, steps;

  // Neighbouring blocks share what they read: Plan::kTogether tiles of tokens, then the next
  // outputs.
  __device__ Tile(const Arguments& arguments, char* memory) : p(arguments) {
    const uint32_t start = shared_address(memory);
    ring = (start + Plan::kAlignment - 1) / Plan::kAlignment * Plan::kAlignment;
    barriers = ring + static_cast<uint32_t>(p.stages * kStageBytes);
    const int block = static_cast<int>(blockIdx.x), run = Plan::kTogether * p.output_tiles;
    const int first = block / run * Plan::kTogether;
    const int together = min(Plan::kTogether, p.token_tiles - first);
    token0 = (first + block % run % together) * kTokens;
    output0 = block % run / together * kOutputs;
    steps = (p.in + Plan::kStep - 1) / Plan::kStep;
  }

  __device__ uint32_t stage(int s) const { return ring + static_cast<uint32_t>(s * kStageBytes); }
  __device__ uint32_t full(int s) const { return barriers + 16 * static_cast<uint32_t>(s); }
  __device__ uint32_t empty(int s) const { return full(s) + 8; }

  // One thread.
  __device__ void init() const {
    for (int s = 0; s < p.stages; ++s)
      init_mbarrier(full(s), 1), init_mbarrier(empty(s), 4 * kGroups);
    publish_mbarriers();
  }

  __device__ void copy_weights(const CUtensorMap& map, int s, int step) const {
    arrive_and_expect(full(s), kStageBytes);
    // Read by nobody else: past what the cache holds.
    if (p.token_tiles == 1)
      copy_tile_once(stage(s), map, output0, step * Plan::kStep, full(s));
    else
      copy_tile(stage(s), map, output0, step * Plan::kStep, full(s));
  }
  __device__ void copy_x(const CUtensorMap& map, int s, int step) const {
    copy_tile(stage(s) + kWeightBytes, map, token0, step * Plan::kStep, full(s));
  }

  // One thread of the copying warp.
  __device__ void copy(const CUtensorMap& weights, const CUtensorMap& x) const {
    const int first = min(p.stages, steps);
    if (!p.settled) wait_for_earlier_work();
    for (int s = 0; s < first; ++s) copy_weights(weights, s, s);
    if (p.settled) wait_for_earlier_work();
    for (int s = 0; s < first; ++s) copy_x(x, s, s);
    int s = 0;
    uint32_t turn = 0;
    for (int step = first; step < steps; ++step) {
      wait_for_phase(empty(s), turn);
      copy_weights(weights, s, step);
      copy_x(x, s, step);
      if (++s == p.stages) s = 0, ++turn;
    }
  }

  // A warpgroup's sums, over the steps in their order: what decides an output's bits.
  __device__ void multiply(float (&d)[kTokens / 2], int group, bool leader) const {
    int s = 0, last = 0;
    uint32_t turn = 0;
    for (int step = 0; step < steps; ++step) {
      wait_for_phase(full(s), turn);
      const uint64_t a =
          tile_descriptor(stage(s) + static_cast<uint32_t>(group * Plan::kGroup * kTileBytes));
      const uint64_t b = tile_descriptor(stage(s) + kWeightBytes);
      begin_products();
#pragma unroll
      for (int k = 0; k < Plan::kStep; k += 16) multiply_tiles(d, a + k / 8, b + k / 8);
      end_products();
      wait_for_products<1>();
      if (step > 0 && leader) arrive(empty(last));
      last = s;
      if (++s == p.stages) s = 0, ++turn;
    }
    wait_for_products<0>();
    settle(d);
  }

  // Of a lane's outputs g and g + 8 of its warp's sixteen.
  __device__ void scale_and_add(float (&d)[kTokens / 2], int output) const {
    if (!p.scale && !p.bias) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int o = min(output + 8 * half, p.out - 1);
      const float scale = p.scale ? p.scale[o] : 1, bias = p.bias ? p.bias[o] : 0;
#pragma unroll
      for (int i = 2 * half; i < kTokens / 2; i += 4) {
        d[i] = fmaf(d[i], scale, bias);
        d[i + 1] = fmaf(d[i + 1], scale, bias);
      }
    }
  }

  // f32: eight lanes' outputs are a whole sector.
  __device__ void store(float* y, const float (&d)[kTokens / 2], int output, int q) const {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = token0 + i / 4 * 8 + 2 * q + i % 2, o = output + i % 4 / 2 * 8;
      if (token < p.tokens && o < p.out) y[token * p.y_stride + o] = d[i];
    }
  }

  // bf16, rounded once: a warp's outputs to where the ring was, a token's one behind the other.
  __device__ void keep(const float (&d)[kTokens / 2], int warp, int lane) const {
    const int row = lane / 16 * 8 + lane % 8, column = 16 * warp + lane / 8 % 2 * 8;
    uint32_t to = ring + static_cast<uint32_t>((row * kPitch + column) * 2);
#pragma unroll
    for (int j = 0; j < kTokens / 2; j += 8) {
      uint32_t m[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        m[k] = pack<bf16>(Floats<2>{d[j + 2 * k], d[j + 2 * k + 1]}).word[0];
      store_transposed(to, m);
      to += 16 * kPitch * 2;
    }
  }
  __device__ void store_kept(bf16* y, const char* memory) const {
    const bf16* const kept =
        reinterpret_cast<const bf16*>(memory + (ring - shared_address(memory)));
    constexpr int kVectors = kOutputs / 8;
    for (int i = static_cast<int>(threadIdx.x); i < kTokens * kVectors; i += kConsumers) {
      const int row = i / kVectors, column = i % kVectors * 8;
      const int64_t token = token0 + row;
      const int output = output0 + column;
      if (token >= p.tokens || output >= p.out) continue;
      const uint4 v = *reinterpret_cast<const uint4*>(kept + row * kPitch + column);
      bf16* const to = y + token * p.y_stride + output;
      if (p.vectors) {
        *reinterpret_cast<uint4*>(to) = v;
      } else {
        for (int k = 0; k < min(8, p.out - output); ++k) to[k] = kept[row * kPitch + column + k];
      }
    }
  }
};

#endif

// Grid: a block for each tile of outputs and rows of x. A warp copies steps of 64 inputs of both
// into a ring in shared memory; warpgroups multiply 64 outputs each. Barriers: for each stage full
// and empty; those of a block's warpgroups at the end, when y takes the ring's place. Numerics: f32
// on the tensor cores, 16 inputs at a time, in order, whatever the tile: an output's bits depend on
// its row of x and its row of the matrix alone. Scaled and added to in f32, rounded once.
template <int kTokens, int kGroups, class Y>
__global__ void __launch_bounds__(128 * kGroups + 32, kTokens == Plan::kMaxTokens ? 1 : 2)
    linear_tiles(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap x,
                 const __grid_constant__ Arguments p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  using Block = Tile<kTokens, kGroups>;
  const Block tile(p, memory);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  if (thread == 32 * Block::kCopyWarp) {
    prefetch_map(weights), prefetch_map(x);
    tile.init();
  }
  __syncthreads();  // the barriers are there
  if (warp == Block::kCopyWarp) {
    if (elect_one()) tile.copy(weights, x);
    __syncwarp();
    let_next_start();
    return;
  }
  float d[kTokens / 2] = {};
  tile.multiply(d, warp / 4, lane == 0);
  wait_for_earlier_work();  // which may still read what y overwrites
  const int output = tile.output0 + 16 * warp + lane / 4;
  tile.scale_and_add(d, output);
  Y* const y = static_cast<Y*>(p.y);
  if constexpr (sizeof(Y) == 4) {
    tile.store(y, d, output, lane % 4);
  } else {
    meet_first<Block::kConsumers>();  // all stages have been read
    tile.keep(d, warp, lane);
    meet_first<Block::kConsumers>();
    tile.store_kept(y, memory);
  }
#endif
}

template <int kTokens, int kGroups>
void launch(const State& gpu, const Linear& op, const Plan& plan, const Arguments& p) {
  const auto with = [&](auto kernel) {
    allow(kernel, Plan::kSharedBytes, 1);
    launch_dependent(gpu, "linear_tiles", kernel,
                     {.grid = dim3(static_cast<unsigned>(plan.blocks())),
                      .block = dim3(static_cast<unsigned>(plan.threads())),
                      .shared_bytes = static_cast<size_t>(plan.shared_bytes())},
                     tensor_map(op.weight, plan.outputs()), tensor_map(op.x, plan.tokens), p);
  };
  if (op.y.dtype == DType::f32)
    with(linear_tiles<kTokens, kGroups, float>);
  else
    with(linear_tiles<kTokens, kGroups, bf16>);
}

}  // namespace

bool takes_tiles(const State& gpu, const Linear& op) {
#ifdef KRAIT_HAS_SM90A
  return gpu.compute_major == 9 && gpu.compute_minor == 0 && op.x.dtype == DType::bf16 &&
         tiles_possible(op.x) &&
         (op.weight.dtype == DType::i8 ? op.weight.shape[1] % 8 == 0 : tiles_possible(op.weight));
#else
  static_cast<void>(gpu), static_cast<void>(op);
  return false;
#endif
}

void launch_tiles(Context& ctx, const Linear& op) {
  const State& gpu = state_of(ctx);
  const int64_t tokens = op.x.shape[0], in = op.x.shape[1], out = op.weight.shape[0];
  const Plan plan = Plan::make(tokens, in, out, gpu.multiprocessors);
  const Arguments p = {.y = op.y.data,
                       .y_stride = op.y.stride[0],
                       .scale = f32(op.weight_scale),
                       .bias = f32(op.bias),
                       .tokens = static_cast<int>(tokens),
                       .in = static_cast<int>(in),
                       .out = static_cast<int>(out),
                       .token_tiles = static_cast<int>(plan.token_tiles),
                       .output_tiles = static_cast<int>(plan.output_tiles),
                       .stages = plan.stages,
                       .vectors = vector_rows(op.y, 8),
                       .settled = op.settled};
  const bool two = plan.groups == 2;
  if (plan.tokens == 256) return launch<256, 2>(gpu, op, plan, p);
  if (plan.tokens == 128)
    return two ? launch<128, 2>(gpu, op, plan, p) : launch<128, 1>(gpu, op, plan, p);
  if (plan.tokens == 64) return launch<64, 1>(gpu, op, plan, p);
  launch<16, 1>(gpu, op, plan, p);
}

}  // namespace krait::cuda
