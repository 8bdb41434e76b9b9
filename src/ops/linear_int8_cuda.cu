// Weights in 8 bits on a GPU: linear_matvec that reads them, and their widening for gemm.
#include "ops/linear_matvec.cuh"

namespace krait::cuda {
namespace {

constexpr int kVector = 8, kWidenThreads = 256;

// Grid: a thread owns V neighbouring elements. Reads one byte and writes sizeof(T) an element.
template <int V, class T>
__global__ void __launch_bounds__(kWidenThreads)
    linear_widen_int8(const int8_t* from, T* to, int64_t count) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
  if (i < count) store_vector(to + i, load_vector<V>(from + i));
}

template <int V, class T>
void widen(Context& ctx, const Tensor& from, const Tensor& to) {
  const int64_t per_block = int64_t{kWidenThreads} * V;
  const auto blocks = static_cast<unsigned>((from.size() + per_block - 1) / per_block);
  linear_widen_int8<V><<<blocks, kWidenThreads, 0, state_of(ctx).stream>>>(
      from.ptr<int8_t>(), to.ptr<T>(), from.size());
  check_launch("linear_widen_int8");
}

}  // namespace

void launch_matvec_int8(Context& ctx, const Linear& op) {
  if (op.x.dtype == DType::f32) return matvec::launch<float, int8_t, float>(ctx, op);
  if (op.y.dtype == DType::f32) return matvec::launch<bf16, int8_t, float>(ctx, op);
  matvec::launch<bf16, int8_t, bf16>(ctx, op);
}

void launch_widen_int8(Context& ctx, const Tensor& from, const Tensor& to) {
  const bool vectors =
      from.size() % kVector == 0 && aligned(from.data, kVector) && aligned(to.data, 16);
  dispatch_f32_bf16(to.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    vectors ? widen<kVector, T>(ctx, from, to) : widen<1, T>(ctx, from, to);
  });
}

}  // namespace krait::cuda
