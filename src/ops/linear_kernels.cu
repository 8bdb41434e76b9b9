#include <algorithm>
#include <initializer_list>

#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/linear_kernels.h"
#include "ops/linear_plan.h"

namespace krait::cuda {
namespace {

constexpr int kBiasThreads = 256;

// Grid: (blocks of columns, rows in steps of grid.y); a thread owns V neighbouring elements at a
// time. Moves 4 + sizeof(Y) bytes an element.
template <int V, class Y>
__global__ void linear_scale_and_bias(const float* from, int64_t from_stride, const float* scale,
                                      const float* bias, Y* to, int64_t to_stride, int64_t rows,
                                      int64_t width) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
  if (column >= width) return;
  const Floats<V> s = scale ? load_vector<V>(scale + column) : constant<V>(1);
  const Floats<V> b = bias ? load_vector<V>(bias + column) : constant<V>(0);
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    Floats<V> x = load_vector<V>(from + row * from_stride + column);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = fmaf(s[i], x[i], b[i]);
    store_vector(to + row * to_stride + column, x);
  }
}

// Grid: (column_blocks, row_blocks); a block sums kColumns columns of rows_per_block rows into one
// row of `sums` (row_blocks, width), a thread every kLanes-th row of one column: 128 bytes of a
// bf16 row per access. Reads dy once. On chip: kLanes x kColumns partial sums.
template <class T>
__global__ void __launch_bounds__(LinearDbiasPlan::kThreads)
    linear_dbias_blocks(const T* dy, int64_t stride, int64_t tokens, int64_t width,
                        int64_t rows_per_block, float* sums) {
  constexpr int kColumns = LinearDbiasPlan::kColumns, kLanes = LinearDbiasPlan::kLanes;
  __shared__ float partial[kLanes][kColumns];
  const int x = static_cast<int>(threadIdx.x) % kColumns,
            lane = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t column = int64_t{blockIdx.x} * kColumns + x;
  const int64_t begin = int64_t{blockIdx.y} * rows_per_block;
  const int64_t end = min(tokens, begin + rows_per_block);
  float sum = 0;
  if (column < width) {
#pragma unroll 8
    for (int64_t t = begin + lane; t < end; t += kLanes)
      sum += load_vector<1>(dy + t * stride + column)[0];
  }
  partial[lane][x] = sum;
  __syncthreads();  // every lane's sum is there
  if (lane > 0 || column >= width) return;
  for (int i = 1; i < kLanes; ++i) sum += partial[i][x];
  sums[int64_t{blockIdx.y} * width + column] = sum;
}

// Grid: columns; a thread owns one and adds the blocks' sums in order.
__global__ void linear_dbias_total(const float* sums, int64_t row_blocks, int64_t width,
                                   float* dbias) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= width) return;
  float total = 0;
#pragma unroll 8
  for (int64_t i = 0; i < row_blocks; ++i) total += sums[i * width + column];
  dbias[column] += total;
}

unsigned blocks_for(int64_t width) {
  return static_cast<unsigned>((width + kBiasThreads - 1) / kBiasThreads);
}

}  // namespace

void launch_scale_and_bias(Context& ctx, const Tensor& from, const Tensor& scale,
                           const Tensor& bias, const Tensor& to) {
  constexpr int V = 4;
  const bool vectors =
      std::ranges::all_of(std::initializer_list<const Tensor*>{&from, &scale, &bias, &to},
                          [](const Tensor* t) { return vector_rows(*t, V); });
  const int64_t rows = to.shape[0], width = to.shape[1];
  const dim3 grid(blocks_for(vectors ? width / V : width),
                  static_cast<unsigned>(std::min<int64_t>(rows, 4096)));
  dispatch_f32_bf16(to.dtype, [&](auto y) {
    using Y = typename decltype(y)::type;
    const auto kernel = vectors ? linear_scale_and_bias<V, Y> : linear_scale_and_bias<1, Y>;
    kernel<<<grid, kBiasThreads, 0, state_of(ctx).stream>>>(from.ptr<float>(), from.stride[0],
                                                            f32(scale), f32(bias), to.ptr<Y>(),
                                                            to.stride[0], rows, width);
  });
  check_launch("linear_scale_and_bias");
}

void launch_dbias(Context& ctx, const Tensor& dy, const Tensor& dbias) {
  const int64_t tokens = dy.shape[0], width = dy.shape[1];
  const cudaStream_t stream = state_of(ctx).stream;
  const LinearDbiasPlan plan = LinearDbiasPlan::make(tokens, width);
  const Arena::Scope scope(ctx.workspace());
  float* sums = ctx.workspace().array<float>(plan.row_blocks * width);
  const dim3 grid(static_cast<unsigned>(plan.column_blocks),
                  static_cast<unsigned>(plan.row_blocks));
  dispatch_f32_bf16(dy.dtype, [&](auto t) {
    linear_dbias_blocks<<<grid, LinearDbiasPlan::kThreads, 0, stream>>>(
        dy.ptr<typename decltype(t)::type>(), dy.stride[0], tokens, width, plan.rows_per_block,
        sums);
  });
  check_launch("linear_dbias_blocks");
  linear_dbias_total<<<blocks_for(width), kBiasThreads, 0, stream>>>(sums, plan.row_blocks, width,
                                                                     dbias.ptr<float>());
  check_launch("linear_dbias_total");
}

}  // namespace krait::cuda
