// Second half of a sum over tokens: adds up what the blocks of a first kernel left, in fixed order.
#pragma once

#include <cstdint>

#include "ops/cuda/state.h"

namespace krait::cuda {

inline constexpr int kPartialColumns = 32, kPartialRows = 16;

// partial: (parts, count). Grid: a block owns 32 of the `count` sums; its row r adds the parts r, r
// + 16, .., then its first row adds the rows. done(i, sum) takes sum i.
template <class F>
__global__ void __launch_bounds__(kPartialColumns* kPartialRows)
    add_partial_sums(const float* partial, const int64_t parts, const int64_t count, const F done) {
  __shared__ float sums[kPartialRows][kPartialColumns];
  const int64_t i = int64_t{blockIdx.x} * kPartialColumns + threadIdx.x;
  float sum = 0;
  if (i < count) {
#pragma unroll 4
    for (int64_t p = threadIdx.y; p < parts; p += kPartialRows) sum += partial[p * count + i];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();  // every row's sums are there
  if (threadIdx.y > 0 || i >= count) return;
#pragma unroll
  for (int row = 1; row < kPartialRows; ++row) sum += sums[row][threadIdx.x];
  done(i, sum);
}

template <class F>
void launch_add_partial_sums(cudaStream_t stream, const float* partial, int64_t parts,
                             int64_t count, const F& done) {
  const auto blocks = static_cast<unsigned>((count + kPartialColumns - 1) / kPartialColumns);
  add_partial_sums<<<blocks, dim3(kPartialColumns, kPartialRows), 0, stream>>>(partial, parts,
                                                                               count, done);
  check_launch("add_partial_sums");
}

}  // namespace krait::cuda
