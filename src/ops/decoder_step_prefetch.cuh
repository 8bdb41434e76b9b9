// decoder_step: what a block reads beside the weights that flow through the ring.
#pragma once

#include "ops/decoder_step.cuh"

namespace krait::cuda {

// The copying warp's: asks for what belongs to a product, so that it is in the second-level cache
// when the warps that multiply load it. Where the plan `streams`: 2.8B wrote 11 % more in a form
// with this, 1.4B in 8 bits 3 % (docs/kernels_cuda.md).
template <int kSeqs, class W>
class PrefetchAhead {
 public:
  __device__ __forceinline__ PrefetchAhead(const DecoderArgs& a, const DecoderProducts<W>& products)
      : a_(a), products_(products), slot_(kFetches && a.slot ? a.slot[0] : 0) {}

  // By the whole warp, while the product before is copied.
  __device__ __forceinline__ void fetch_for(int product) const {
    if constexpr (kFetches) {
      if (!a_.streams) return;
      const DecoderProduct kind = products_.kind(product);
      if (kind != DecoderProduct::in_x && kind != DecoderProduct::in_z) return;
      const DecoderLayerArgs& l = products_.layer(product / kDecoderLayerProducts);
      if (kind == DecoderProduct::in_x)
        fetch_conv(l);
      else
        fetch_scan(l);
    }
  }

 private:
  static constexpr bool kFetches = kSeqs == 1;
  static constexpr int kLine = 128;  // bytes

  template <class T>
  static __device__ __forceinline__ void fetch(const T* from, int count) {
    const char *begin = reinterpret_cast<const char*>(from),
               *end = reinterpret_cast<const char*>(from + count);
    const char* const first = begin - reinterpret_cast<uintptr_t>(begin) % kLine;
#pragma unroll 1
    for (const char* line = first + threadIdx.x % 32 * kLine; line < end; line += 32 * kLine)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(line)));
  }
  __device__ __forceinline__ void fetch_states(void* states, int64_t first, int count) const {
    const StatesAt from = StatesAt{states, a_.bf16_states} + first;
    fetch(static_cast<const char*>(from.states), count * (a_.bf16_states ? 2 : 4));
  }
  __device__ __forceinline__ const ProductShape& channels() const {
    return products_.shape(DecoderProduct::in_x);
  }
  __device__ __forceinline__ void fetch_conv(const DecoderLayerArgs& l) const {
    const int first = channels().first, count = channels().count;
    fetch(l.conv_weight + 4 * first, 4 * count);
    if (l.conv_bias) fetch(l.conv_bias + first, count);
#pragma unroll 1
    for (int i = 0; i < 3; ++i)
      fetch_states(l.conv, (int64_t{slot_} * 3 + i) * a_.d_inner + first, count);
  }
  __device__ __forceinline__ void fetch_scan(const DecoderLayerArgs& l) const {
    const int64_t first = channels().first;
    const int count = channels().count;
    fetch_states(l.ssm, (int64_t{slot_} * a_.d_inner + first) * a_.d_state, count * a_.d_state);
    fetch(l.A + first * a_.d_state, count * a_.d_state);
    fetch(l.D + first, count);
    fetch(l.dt_bias + first, count);
    fetch(l.dt_proj + first * a_.dt_rank, count * a_.dt_rank);
  }

  const DecoderArgs& a_;
  const DecoderProducts<W>& products_;
  const int slot_;
};

}  // namespace krait::cuda
