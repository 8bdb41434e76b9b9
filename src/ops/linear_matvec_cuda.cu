// linear_matvec with weights in x's type.
#include "ops/linear_matvec.cuh"

namespace krait::cuda {

void launch_matvec(Context& ctx, const Linear& op) {
  if (op.x.dtype == DType::f32) return matvec::launch<float, float, float>(ctx, op);
  if (op.y.dtype == DType::f32) return matvec::launch<bf16, bf16, float>(ctx, op);
  matvec::launch<bf16, bf16, bf16>(ctx, op);
}

}  // namespace krait::cuda
