// Strategy: of what cuBLASLt's heuristic offers for the exact shape, strides, types and alignments
// the first, or in some products the first with a tile that we prefer, kept for the next call. The
// heuristic is a function of these and of the GPU, so the choice and the bits are the same in every
// run. Sums that several blocks share go through the workspace in f32, in fixed order.
#include "ops/cuda/gemm.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <span>
#include <string>
#include <tuple>

#include "core/error.h"

namespace krait::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what cuBLAS recommends for Hopper
constexpr size_t kMaxPlans = 4096;
constexpr uint32_t kMaxAlignment = 16;  // no kernel asks for more; fewer distinct plans

// The heuristic likes tiles that two groups of warps share: while they store one, nobody
// multiplies. In large products with short sums and an output in bf16 the largest tiles that a
// group has for itself are up to 18 % faster, where the heuristic offers them
// (docs/kernels_cuda.md).
constexpr double kLargeProduct = 4e9;  // multiply-adds: some 10 microseconds
constexpr int64_t kWide = 768, kLeastSum = 128, kShortSum = 3072;
constexpr int kCandidates = 8;
constexpr cublasLtMatmulTile_t kPreferredTiles[] = {
    CUBLASLT_MATMUL_TILE_168x128, CUBLASLT_MATMUL_TILE_176x128, CUBLASLT_MATMUL_TILE_128x168,
    CUBLASLT_MATMUL_TILE_128x176, CUBLASLT_MATMUL_TILE_128x160, CUBLASLT_MATMUL_TILE_160x128};

void check(cublasStatus_t status, const char* doing) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(std::string("cuBLASLt failed: ") + cublasLtGetStatusName(status), doing);
}

// A matrix as cuBLASLt sees it: column-major, rows x cols, columns ld elements apart.
struct Operand {
  int64_t rows, cols, ld;
  bool transpose;
  DType dtype;
  uint32_t alignment;  // of the first element, in bytes

  auto operator<=>(const Operand&) const = default;
};

// Our row-major t is its column-major transpose, so that a product's operands change places:
// c^T = b^T a^T.
Operand operand_of(const Tensor& t) {
  const auto address = reinterpret_cast<uintptr_t>(t.data);
  const bool rows_dense = t.stride[1] == 1;
  Operand o{.rows = rows_dense ? t.shape[1] : t.shape[0],
            .cols = rows_dense ? t.shape[0] : t.shape[1],
            .ld = rows_dense ? t.stride[0] : t.stride[1],
            .transpose = !rows_dense,
            .dtype = t.dtype,
            .alignment = static_cast<uint32_t>(
                std::min<uintptr_t>(address & (~address + 1), kMaxAlignment))};
  if (o.cols == 1) o.ld = o.rows;  // a stride that is never taken
  return o;
}

struct Key {
  Operand a, b, c;  // cuBLASLt's a and b: our b and a
  bool accumulate;

  auto operator<=>(const Key&) const = default;
};

struct Plan {
  bool usable = false;
  cublasLtMatmulDescOpaque_t matmul{};
  cublasLtMatrixLayoutOpaque_t a{}, b{}, c{};
  cublasLtMatmulAlgo_t algo{};
  size_t workspace = 0;
};

cudaDataType_t type_of(DType dtype) { return dtype == DType::f32 ? CUDA_R_32F : CUDA_R_16BF; }

void set_layout(cublasLtMatrixLayoutOpaque_t& layout, const Operand& o) {
  check(cublasLtMatrixLayoutInit(&layout, type_of(o.dtype), static_cast<uint64_t>(o.rows),
                                 static_cast<uint64_t>(o.cols), o.ld),
        "describing a matrix");
}

void set_transpose(cublasLtMatmulDescOpaque_t& matmul, cublasLtMatmulDescAttributes_t which,
                   bool transpose) {
  const cublasOperation_t op = transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
  check(cublasLtMatmulDescSetAttribute(&matmul, which, &op, sizeof op), "describing a product");
}

template <class T>
void set(cublasLtMatmulPreferenceOpaque_t& preference, cublasLtMatmulPreferenceAttributes_t which,
         T value) {
  check(cublasLtMatmulPreferenceSetAttribute(&preference, which, &value, sizeof value),
        "describing a product");
}

cublasLtMatmulPreferenceOpaque_t preference_of(const Key& key) {
  cublasLtMatmulPreferenceOpaque_t preference{};
  check(cublasLtMatmulPreferenceInit(&preference), "describing a product");
  set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.a.alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.b.alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.c.alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.c.alignment);
  return preference;
}

bool has_preferred_tiles(const Key& key) {
  const int64_t summed = key.a.transpose ? key.a.rows : key.a.cols;
  return key.c.dtype == DType::bf16 && summed >= kLeastSum && summed <= kShortSum &&
         std::min(key.c.rows, key.c.cols) >= kWide &&
         static_cast<double>(key.c.rows * key.c.cols) * static_cast<double>(summed) >=
             kLargeProduct;
}

template <class T>
T attribute(const cublasLtMatmulHeuristicResult_t& candidate,
            cublasLtMatmulAlgoConfigAttributes_t which) {
  T value{};
  size_t written = 0;
  check(
      cublasLtMatmulAlgoConfigGetAttribute(&candidate.algo, which, &value, sizeof value, &written),
      "asking for a kernel's tile");
  return value;
}

// The first candidate of a preferred tile, or the first of all.
const cublasLtMatmulHeuristicResult_t& choose(
    std::span<const cublasLtMatmulHeuristicResult_t> candidates) {
  for (const cublasLtMatmulTile_t tile : kPreferredTiles)
    for (const auto& c : candidates)
      if (c.state == CUBLAS_STATUS_SUCCESS &&
          attribute<uint32_t>(c, CUBLASLT_ALGO_CONFIG_TILE_ID) == tile &&
          attribute<int32_t>(c, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1)
        return c;
  return candidates.front();
}

Plan make_plan(cublasLtHandle_t handle, const Key& key) {
  Plan plan;
  for (const Operand* o : {&key.a, &key.b, &key.c})
    if (o->ld < o->rows) return plan;  // overlapping rows (a stride of 0)
  check(cublasLtMatmulDescInit(&plan.matmul, CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "describing a product");
  set_transpose(plan.matmul, CUBLASLT_MATMUL_DESC_TRANSA, key.a.transpose);
  set_transpose(plan.matmul, CUBLASLT_MATMUL_DESC_TRANSB, key.b.transpose);
  set_layout(plan.a, key.a);
  set_layout(plan.b, key.b);
  set_layout(plan.c, key.c);
  cublasLtMatmulPreferenceOpaque_t preference = preference_of(key);
  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> candidates{};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle, &plan.matmul, &plan.a, &plan.b, &plan.c, &plan.c, &preference,
      has_preferred_tiles(key) ? kCandidates : 1, candidates.data(), &found);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return plan;
  check(status, "choosing a product's kernel");
  if (found == 0 || candidates[0].state != CUBLAS_STATUS_SUCCESS) return plan;
  const auto& result = choose({candidates.data(), static_cast<size_t>(found)});
  plan.usable = true;
  plan.algo = result.algo;
  plan.workspace = result.workspaceSize;
  return plan;
}

}  // namespace

struct State::Blas {
  Blas() : workspace(kWorkspaceBytes, device_memory()) {
    check(cublasLtCreate(&handle), "starting cuBLASLt");
  }
  ~Blas() { cublasLtDestroy(handle); }
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  Plan& plan(const Key& key) {
    if (const auto it = plans.find(key); it != plans.end()) return it->second;
    if (plans.size() >= kMaxPlans) plans.clear();
    return plans.emplace(key, make_plan(handle, key)).first->second;
  }

  cublasLtHandle_t handle = nullptr;
  Buffer workspace;
  std::map<Key, Plan> plans;
};

void gemm(Context& ctx, const Gemm& op) {
  State& state = state_of(ctx);
  if (!state.blas) state.blas = std::make_shared<State::Blas>();
  Plan& plan = state.blas->plan({.a = operand_of(op.b),
                                 .b = operand_of(op.a),
                                 .c = operand_of(op.c),
                                 .accumulate = op.accumulate});
  if (!plan.usable) return gemm_tiled(ctx, op);
  const float alpha = 1, beta = op.accumulate ? 1 : 0;
  check(cublasLtMatmul(state.blas->handle, &plan.matmul, &alpha, op.b.data, &plan.a, op.a.data,
                       &plan.b, &beta, op.c.data, &plan.c, op.c.data, &plan.c, &plan.algo,
                       state.blas->workspace.data(), plan.workspace, state.stream),
        "multiplying matrices");
}

}  // namespace krait::cuda
