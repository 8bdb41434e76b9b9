// linear_skinny: y = x weight^T for tens of rows and a weight of few rows and many columns, which
// is what x_proj is to a step of many sequences: too few outputs to go round, long sums.
#include <cooperative_groups.h>

#include "ops/cuda/dependent_launch.cuh"
#include "ops/cuda/mma.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/linear_kernels.h"
#include "ops/linear_plan.h"

namespace krait::cuda {
namespace {

constexpr int kTile = LinearSkinnyPlan::kTile, kThreads = LinearSkinnyPlan::kThreads;
constexpr int kCluster = LinearSkinnyPlan::kCluster;

// Not used before 9.0.
[[maybe_unused]] constexpr int kWarps = kThreads / 32;
[[maybe_unused]] constexpr int kStep = 32;  // inputs that a warp multiplies at once: 64 bytes
[[maybe_unused]] constexpr int kAhead = 4;  // steps whose loads are on their way together
[[maybe_unused]] constexpr int kRows16 = kTile / 16, kColumns8 = kTile / 8;  // a product's tiles

struct Product {
  const bf16 *x, *weight;
  bf16* y;
  int64_t x_stride, y_stride;
  int rows, in, out;
  bool settled;
};

// Grid: x over tiles of kTile outputs, each of kCluster blocks that share its inputs, y over tiles
// of kTile rows. A warp takes every 32nd step of kStep inputs; a lane loads 16 bytes of a row at a
// time, which are the operands of two products: the order of inputs within a step is its own. On
// chip: operands in registers, weights of the first kAhead steps before the work before this kernel
// is done; 4 KiB of sums for each warp. Barriers: the warps' sums are there; the blocks' are; all
// have read them. Numerics: f32, a warp's steps in order, then the warps, then the blocks: an order
// that `in` alone decides.
__global__ void __launch_bounds__(kThreads) linear_skinny(const __grid_constant__ Product p) {
#if __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  __shared__ float of_warp[kWarps][kTile * kTile];
  __shared__ float sums[kTile * kTile];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank()), thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, g = thread % 32 / 4, q = thread % 4;
  const int column0 = static_cast<int>(blockIdx.x) / kCluster * kTile;
  const int row0 = static_cast<int>(blockIdx.y) * kTile, steps = p.in / kStep;
  const int first = rank * kWarps + warp;
  constexpr int kBetween = kCluster * kWarps;
  const auto load = [](const bf16* from) { return *reinterpret_cast<const uint4*>(from); };
  uint4 w[kAhead][kColumns8], x[kAhead][2 * kRows16];
  const auto load_weights = [&](int step0) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int j = 0; j < kColumns8; ++j) {
        const int step = step0 + k * kBetween, column = min(column0 + 8 * j + g, p.out - 1);
        w[k][j] =
            step < steps ? load(p.weight + int64_t{column} * p.in + step * kStep + 8 * q) : uint4{};
      }
  };
  if (!p.settled) wait_for_earlier_work();
  load_weights(first);
  if (p.settled) wait_for_earlier_work();
  let_next_start();
  float d[kRows16][kColumns8][4] = {};
  for (int step0 = first; step0 < steps; step0 += kAhead * kBetween) {
    if (step0 > first) load_weights(step0);
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int j = 0; j < 2 * kRows16; ++j) {
        const int step = step0 + k * kBetween, row = min(row0 + 8 * j + g, p.rows - 1);
        x[k][j] = step < steps ? load(p.x + row * p.x_stride + step * kStep + 8 * q) : uint4{};
      }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int i = 0; i < kRows16; ++i)
#pragma unroll
        for (int j = 0; j < kColumns8; ++j) {
          const uint4 &a = x[k][2 * i], &b = x[k][2 * i + 1], &c = w[k][j];
          mma_bf16(d[i][j], {a.x, b.x, a.y, b.y}, c.x, c.y);
          mma_bf16(d[i][j], {a.z, b.z, a.w, b.w}, c.z, c.w);
        }
  }
#pragma unroll
  for (int i = 0; i < kRows16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns8; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        of_warp[warp][(16 * i + g + k / 2 * 8) * kTile + 8 * j + 2 * q + k % 2] = d[i][j][k];
  __syncthreads();
  for (int i = thread; i < kTile * kTile; i += kThreads) {
    float sum = of_warp[0][i];
#pragma unroll
    for (int other = 1; other < kWarps; ++other) sum += of_warp[other][i];
    sums[i] = sum;
  }
  cluster.sync();
  constexpr int kShare = kTile * kTile / kCluster;  // of a block
  for (int i = rank * kShare + thread; i < (rank + 1) * kShare; i += kThreads) {
    float part[kCluster];
#pragma unroll
    for (int block = 0; block < kCluster; ++block)
      part[block] = cluster.map_shared_rank(sums, block)[i];
#pragma unroll
    for (int block = 1; block < kCluster; ++block) part[0] += part[block];
    const int row = row0 + i / kTile, column = column0 + i % kTile;
    if (row < p.rows && column < p.out)
      store_vector(p.y + row * p.y_stride + column, constant<1>(part[0]));
  }
  cluster.sync();
#endif
}

}  // namespace

bool skinny_possible(const State& gpu, const Linear& op) {
  return gpu.compute_major >= 9 && op.x.dtype == DType::bf16 && op.y.dtype == DType::bf16 &&
         op.weight.dtype == DType::bf16 && !op.bias &&
         LinearSkinnyPlan::possible(op.x.shape[1], op.weight.shape[0]) && vector_rows(op.x, 8) &&
         vector_rows(op.weight, 8);
}

bool skinny_takes(const State& gpu, const Linear& op) {
  return LinearSkinnyPlan::fits(op.x.shape[0]) && skinny_possible(gpu, op);
}

void launch_skinny(Context& ctx, const Linear& op) {
  const Product p = {.x = op.x.ptr<bf16>(),
                     .weight = op.weight.ptr<bf16>(),
                     .y = op.y.ptr<bf16>(),
                     .x_stride = op.x.stride[0],
                     .y_stride = op.y.stride[0],
                     .rows = static_cast<int>(op.x.shape[0]),
                     .in = static_cast<int>(op.x.shape[1]),
                     .out = static_cast<int>(op.weight.shape[0]),
                     .settled = op.settled};
  const auto plan = LinearSkinnyPlan::make(p.rows, p.out);
  launch_dependent(state_of(ctx), "linear_skinny", linear_skinny,
                   {.grid = dim3(static_cast<unsigned>(plan.output_blocks),
                                 static_cast<unsigned>(plan.row_blocks)),
                    .block = kThreads,
                    .cluster = kCluster},
                   p);
}

}  // namespace krait::cuda
