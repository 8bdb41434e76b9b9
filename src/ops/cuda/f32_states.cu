#include "ops/cuda/arguments.h"
#include "ops/cuda/f32_states.h"
#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;

// Grid: a thread owns V neighbouring elements of a sequence's row. Moves 6 bytes an element.
template <class From, class To, int V, bool kToSlots>
__global__ void __launch_bounds__(kThreads)
    convert_states(const From* from, To* to, const int32_t* slot, const int64_t width,
                   const int64_t count) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
  if (i >= count) return;
  const int64_t sequence = i / width;
  const int64_t there = (slot ? slot[sequence] : sequence) * width + i % width;
  store_vector(to + (kToSlots ? there : i), load_vector<V>(from + (kToSlots ? i : there)));
}

template <class From, class To, bool kToSlots>
void launch(Context& ctx, const Tensor& from, const Tensor& to, const Tensor& slot,
            const Tensor& rows) {
  const int64_t count = rows.size(), width = count / rows.shape[0];
  const auto start = [&](auto vector) {
    constexpr int V = vector;
    const auto blocks = static_cast<unsigned>((count / V + kThreads - 1) / kThreads);
    convert_states<From, To, V, kToSlots><<<blocks, kThreads, 0, state_of(ctx).stream>>>(
        from.ptr<From>(), to.ptr<To>(), i32(slot), width, count);
    check_launch("convert_states");
  };
  if (width % 4 == 0 && aligned(from) && aligned(to))
    start(std::integral_constant<int, 4>{});
  else
    start(std::integral_constant<int, 1>{});
}

}  // namespace

void launch_widen_states(Context& ctx, const Tensor& pool, const Tensor& slot, const Tensor& rows) {
  launch<bf16, float, false>(ctx, pool, rows, slot, rows);
}

void launch_round_states(Context& ctx, const Tensor& rows, const Tensor& slot, const Tensor& pool) {
  launch<float, bf16, true>(ctx, rows, pool, slot, rows);
}

}  // namespace krait::cuda
