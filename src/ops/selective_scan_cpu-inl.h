// What the scan's forward and backward files share inside a SIMD target.

// Highway's per-target include guard.
#if defined(KRAIT_OPS_SELECTIVE_SCAN_CPU_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_SELECTIVE_SCAN_CPU_INL_H_
#undef KRAIT_OPS_SELECTIVE_SCAN_CPU_INL_H_
#else
#define KRAIT_OPS_SELECTIVE_SCAN_CPU_INL_H_
#endif

#include "ops/selective_scan_cpu.h"
#include "ops/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

// Rows [begin, begin + tokens) of B or C, one group, as f32: (tokens, d_state) dense.
template <class T>
void stage_rows(const Tensor& x, int64_t group, int64_t begin, int64_t tokens, float* out) {
  const DF d;
  const size_t d_state = static_cast<size_t>(x.shape[2]);
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = x.row<T>(begin + t) + group * x.stride[1];
    float* to = out + static_cast<size_t>(t) * d_state;
    for_each_vector(d_state, [&](size_t i, size_t valid) {
      store_part(d, load_part(d, row + i, valid), to + i, valid);
    });
  }
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
