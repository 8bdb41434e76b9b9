// linear_matvec: y = x weight^T + bias for few rows of x, with weights in x's type or in 8 bits.
// Each group of kMaxTokens rows reads the weights once. A row's bits do not depend on how many rows
// there are.
#pragma once

#include <algorithm>

#include "ops/cuda/vector.cuh"
#include "ops/linear_kernels.h"
#include "ops/linear_plan.h"

namespace krait::cuda::matvec {

constexpr int kRows = LinearMatvecPlan::kRows, kThreads = LinearMatvecPlan::kThreads,
              kWarp = LinearMatvecPlan::kWarp;

template <class T, class W, class Y>
struct Product {
  const T* x;
  const W* weight;
  const float* scale;  // of the weights' rows, or null
  const float* bias;   // or null
  Y* y;
  int64_t tokens, in, out, x_stride, y_stride;
  bool x_aligned;
};

// V elements of x; one by one where the row is not aligned for more: the same sums either way.
template <int V, bool kAligned, class T>
__device__ Floats<V> load_x(const T* x) {
  if constexpr (kAligned) {
    return load_vector<V>(x);
  } else {
    Floats<V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = load_vector<1>(x + i)[0];
    return out;
  }
}

// sum[r][t] += this thread's share of weight row r times x row t: every kGroup-th vector. Weights
// of several vectors are asked for before the first is used.
template <int V, int kGroup, bool kAligned, int kTokens, class T, class W, class Y>
__device__ void accumulate(float (&sum)[kRows][kTokens], const Product<T, W, Y>& p,
                           const W* (&weight)[kRows], int64_t token) {
  constexpr int kAhead = kTokens == 1 ? 4 : 2, kStep = kGroup * V;
  for (int64_t first = int64_t{threadIdx.x} % kGroup * V; first < p.in; first += kAhead * kStep) {
    Packed<W, V> w[kAhead][kRows] = {};
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (first + k * kStep < p.in) w[k][r] = load_packed<V>(weight[r] + first + k * kStep);
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const T* row = p.x + min(token + t, p.tokens - 1) * p.x_stride;
        Floats<V> x = constant<V>(0);
        if (first + k * kStep < p.in) x = load_x<V, kAligned>(row + first + k * kStep);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Floats<V> row_weights = unpack(w[k][r]);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[r][t] = fmaf(row_weights[v], x[v], sum[r][t]);
        }
      }
  }
}

// Grid: (blocks of outputs, groups of kTokens tokens in steps of grid.y); a group of kGroup
// threads, the block or a warp, owns kRows outputs of kTokens tokens, its threads share the inputs:
// a thread has up to 16 vectors of weights in flight. On chip: the sums; x comes from the L1 cache.
// Moves out * in weights. Numerics: each thread sums its elements in order in f32, then a tree over
// the lanes, then the group's warps in order, then scale and bias, then one rounding. Measured on
// an H200, one token in bf16: 4096 x 2048 in 6.5 us, 2.6 TB/s of 4.25.
template <class T, class W, class Y, int V, int kGroup, int kTokens>
__global__ void __launch_bounds__(kThreads) linear_matvec(Product<T, W, Y> p) {
  constexpr int kWarps = kGroup / kWarp, kGroups = kThreads / kGroup;
  __shared__ float of_warp[kThreads / kWarp][kRows][kTokens];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp,
            group = thread / kGroup;
  const auto sync = [] {
    if constexpr (kWarps > 1)
      __syncthreads();
    else
      __syncwarp();
  };
  const int64_t output = (int64_t{blockIdx.x} * kGroups + group) * kRows;
  const W* weight[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) weight[r] = p.weight + min(output + r, p.out - 1) * p.in;
  for (int64_t token = int64_t{blockIdx.y} * kTokens; token < p.tokens;
       token += int64_t{gridDim.y} * kTokens) {
    float sum[kRows][kTokens] = {};
    if (V == 1 || p.x_aligned)
      accumulate<V, kGroup, true>(sum, p, weight, token);
    else
      accumulate<V, kGroup, false>(sum, p, weight, token);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2)
          sum[r][t] += __shfl_xor_sync(~0u, sum[r][t], step);
        if (lane == 0) of_warp[warp][r][t] = sum[r][t];
      }
    sync();  // every warp's sums are there
    const int r = thread % kGroup / kTokens, t = thread % kTokens;
    if (r < kRows && output + r < p.out && token + t < p.tokens) {
      float total = of_warp[group * kWarps][r][t];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) total += of_warp[group * kWarps + w][r][t];
      if (p.scale) total *= p.scale[output + r];
      if (p.bias) total += p.bias[output + r];
      store_vector(p.y + (token + t) * p.y_stride + output + r, constant<1>(total));
    }
    sync();  // and have been read
  }
}

template <int V, int kGroup, class T, class W, class Y>
void launch(Context& ctx, const LinearMatvecPlan& plan, const Product<T, W, Y>& p) {
  const dim3 grid(static_cast<unsigned>(plan.output_blocks),
                  static_cast<unsigned>(plan.token_blocks));
  const auto kernel = plan.tokens_per_block == 1
                          ? linear_matvec<T, W, Y, V, kGroup, 1>
                          : linear_matvec<T, W, Y, V, kGroup, LinearMatvecPlan::kMaxTokens>;
  kernel<<<grid, kThreads, 0, state_of(ctx).stream>>>(p);
  check_launch("linear_matvec");
}

template <class T, class W, class Y>
void launch(Context& ctx, const Linear& op) {
  constexpr bool kInt8 = sizeof(W) == 1;
  constexpr int V = kInt8 ? 8 : 16 / static_cast<int>(sizeof(W));
  const int64_t tokens = op.x.shape[0], out = op.weight.shape[0];
  const auto plan = kInt8 ? LinearMatvecPlan::make_int8(tokens, out, state_of(ctx).multiprocessors)
                          : LinearMatvecPlan::make(tokens, out);
  const Product<T, W, Y> p{.x = op.x.ptr<T>(),
                           .weight = op.weight.ptr<W>(),
                           .scale = op.weight_scale ? op.weight_scale.ptr<float>() : nullptr,
                           .bias = op.bias ? op.bias.ptr<float>() : nullptr,
                           .y = op.y.ptr<Y>(),
                           .tokens = tokens,
                           .in = op.x.shape[1],
                           .out = out,
                           .x_stride = op.x.stride[0],
                           .y_stride = op.y.stride[0],
                           .x_aligned = aligned(op.x.data, 16) && op.x.stride[0] % V == 0};
  const bool vectors = p.in % V == 0 && aligned(p.weight, V * sizeof(W));
  if constexpr (kInt8)
    if (plan.threads_per_group == kWarp)
      return vectors ? launch<V, kWarp>(ctx, plan, p) : launch<1, kWarp>(ctx, plan, p);
  vectors ? launch<V, kThreads>(ctx, plan, p) : launch<1, kThreads>(ctx, plan, p);
}

}  // namespace krait::cuda::matvec
