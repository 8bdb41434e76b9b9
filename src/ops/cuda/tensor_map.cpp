#include "ops/cuda/tensor_map.h"

#include <cudaTypedefs.h>

#include "core/error.h"
#include "ops/cuda/arguments.h"
#include "ops/cuda/state.h"

namespace krait::cuda {
namespace {

// The driver's function, without linking the driver: the module is loaded where there is none, too.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found),
        "looking for the driver's tensor maps");
  if (!function) throw Error("the driver has no tensor maps", "preparing a product");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

bool tiles_possible(const Tensor& m) {
  return m.rank == 2 && m.dtype == DType::bf16 && aligned(m) && m.stride[1] == 1 &&
         m.stride[0] >= m.shape[1] && m.stride[0] % 8 == 0 && m.stride[0] < int64_t{1} << 38 &&
         m.shape[0] < int64_t{1} << 31 && m.shape[1] < int64_t{1} << 31;
}

CUtensorMap tensor_map(const Tensor& m, int rows) {
  static const auto encode = encoder();
  constexpr uint32_t kElements = kTileBytes / 2;
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(m.shape[1]),
                                static_cast<cuuint64_t>(m.shape[0])};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(m.stride[0]) * 2};
  const cuuint32_t tile[] = {kElements, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, m.data, extents, row_bytes, tile, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw Error("the driver refuses a tensor map", "preparing a product");
  return map;
}

}  // namespace krait::cuda
