// gemm_tiled: the product for operands that cuBLASLt refuses, whose rows overlap (a stride of 0).
#include "core/error.h"
#include "ops/cuda/gemm.h"
#include "ops/cuda/vector.cuh"
#include "ops/linear_plan.h"

namespace krait::cuda {
namespace {

constexpr int kTile = GemmTiledPlan::kTile, kPanel = GemmTiledPlan::kPanel;
constexpr int kThreads = GemmTiledPlan::kThreads;
constexpr int kPitch = kTile + 4;  // floats; rows of a panel start in different banks

// An operand seen as (outer, k): a's rows or b's columns, and the dimension that is summed over.
template <class T>
struct Side {
  const T* data;
  int64_t outer_stride, k_stride;
  int64_t outer;  // extent
};

struct Extents {
  int64_t m, n, k, c_stride;
  bool accumulate;
};

// panel[k][outer] of the tile that starts at (first, k0); beyond the edges 0. Neighbouring threads
// take the neighbours in memory.
template <class T>
__device__ void load_panel(float (&panel)[kPanel][kPitch], const Side<T>& side, int64_t first,
                           int64_t k0, int64_t k_end) {
  const bool k_dense = side.k_stride == 1;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kPanel; i += kThreads) {
    const int k = k_dense ? i % kPanel : i / kTile;
    const int outer = k_dense ? i / kPanel : i % kTile;
    const bool inside = first + outer < side.outer && k0 + k < k_end;
    const T* from = side.data + (first + outer) * side.outer_stride + (k0 + k) * side.k_stride;
    panel[k][outer] = inside ? load_vector<1>(from)[0] : 0.0f;
  }
}

// Grid: (tiles of m, tiles of n); a block owns kTile x kTile of c, a thread 4 x 4 of it (rows
// 4 ty + i, columns 4 tx + j). On chip: one panel of a and of b (2 x 16 x 64 floats), 32 sums in
// registers. Bound by its fused multiply-adds, two shared loads of 16 bytes for 16 of them.
// Numerics: an element is the sum over k in order, in f32, in groups of kPanelsPerSum panels.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    gemm_tiled_kernel(Side<T> a, Side<T> b, C* c, Extents extents) {
  __shared__ __align__(16) float a_panel[kPanel][kPitch];
  __shared__ __align__(16) float b_panel[kPanel][kPitch];
  const int64_t row0 = int64_t{blockIdx.x} * kTile, column0 = int64_t{blockIdx.y} * kTile;
  const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;
  float total[4][4] = {}, sum[4][4] = {};
  int panels = 0;
  for (int64_t k0 = 0; k0 < extents.k; k0 += kPanel) {
    load_panel(a_panel, a, row0, k0, extents.k);
    load_panel(b_panel, b, column0, k0, extents.k);
    __syncthreads();  // the panels are complete
#pragma unroll
    for (int k = 0; k < kPanel; ++k) {
      const float4 x = *reinterpret_cast<const float4*>(&a_panel[k][4 * ty]);
      const float4 w = *reinterpret_cast<const float4*>(&b_panel[k][4 * tx]);
      const float xs[4] = {x.x, x.y, x.z, x.w}, ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(xs[i], ws[j], sum[i][j]);
    }
    __syncthreads();  // the panels may be overwritten
    const bool last = k0 + kPanel >= extents.k;
    if (++panels < GemmTiledPlan::kPanelsPerSum && !last) continue;
    panels = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        total[i][j] += sum[i][j];
        sum[i][j] = 0;
      }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = row0 + 4 * ty + i, column = column0 + 4 * tx + j;
      if (row >= extents.m || column >= extents.n) continue;
      C* to = c + row * extents.c_stride + column;
      const float before = extents.accumulate ? load_vector<1>(to)[0] : 0.0f;
      store_vector(to, constant<1>(before + total[i][j]));
    }
}

}  // namespace

void gemm_tiled(Context& ctx, const Gemm& op) {
  const int64_t m = op.c.shape[0], n = op.c.shape[1];
  const GemmTiledPlan plan = GemmTiledPlan::make(m, n);
  const dim3 grid(static_cast<unsigned>(plan.tiles_m), static_cast<unsigned>(plan.tiles_n));
  const Extents extents{m, n, op.a.shape[1], op.c.stride[0], op.accumulate};
  dispatch_f32_bf16(op.a.dtype, [&](auto t) {
    dispatch_f32_bf16(op.c.dtype, [&](auto u) {
      using T = typename decltype(t)::type;
      using C = typename decltype(u)::type;
      if constexpr (sizeof(C) >= sizeof(T)) {
        const Side<T> a{op.a.ptr<T>(), op.a.stride[0], op.a.stride[1], m};
        const Side<T> b{op.b.ptr<T>(), op.b.stride[1], op.b.stride[0], n};
        gemm_tiled_kernel<<<grid, kThreads, 0, state_of(ctx).stream>>>(a, b, op.c.ptr<C>(),
                                                                       extents);
      } else {
        KRAIT_CHECK(false, "a product of f32 is f32");
      }
    });
  });
  check_launch("gemm_tiled");
}

}  // namespace krait::cuda
