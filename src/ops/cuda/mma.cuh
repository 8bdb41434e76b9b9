// Products of small matrices on the tensor cores (in bf16; in tf32: of an operand's 23 bits of
// mantissa 10 count, the rest is cut off), and shared memory by address.
//
// Of a 16 x 8 operand A the lane g * 4 + q holds a0: (row g, column q), a1: (g + 8, q), a2: (g, q +
// 4), a3: (g + 8, q + 4); of an 8 x 8 operand B b0: (row q, column g), b1: (q + 4, g); of the 16 x
// 8 result d0, d1: (row g, columns 2q, 2q + 1), d2, d3: (g + 8, the same). In bf16 operands are
// twice as deep: instead of the element at q the pair at 2q and 2q + 1, instead of that at q + 4
// the pair 8 further.
#pragma once

#include <cstdint>

namespace krait::cuda {

// Cutting makes values smaller by this on average (0.72: the mean of 1 / m over mantissas m).
inline constexpr float kCutToTf32 = 0.72f / 2048;

// d += a b
__device__ __forceinline__ void mma(float (&d)[4], float a0, float a1, float a2, float a3, float b0,
                                    float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// d = a b
__device__ __forceinline__ void mma_from_zero(float (&d)[4], float a0, float a1, float a2, float a3,
                                              float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)), "f"(0.f));
}

// d += a b in bf16
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// m16n8k32 of signed bytes, sums in 32 bits.
__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The address is pinned in its register: else it is computed afresh wherever it is needed.
__device__ __forceinline__ uint32_t pinned_address(const void* p) {
  auto address = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("" : "+r"(address));
  return address;
}
// Offsets in floats.
__device__ __forceinline__ void load4(float (&v)[4], uint32_t base, int offset = 0) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(base + static_cast<uint32_t>(offset) * 4));
}
__device__ __forceinline__ void load2(float (&v)[2], uint32_t base, int offset = 0) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(v[0]), "=f"(v[1])
               : "r"(base + static_cast<uint32_t>(offset) * 4));
}
__device__ __forceinline__ void store4(uint32_t base, int offset, float x, float y, float z,
                                       float w) {
  asm volatile(
      "st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(base + static_cast<uint32_t>(offset) * 4),
      "f"(x), "f"(y), "f"(z), "f"(w));
}
__device__ __forceinline__ void store2(uint32_t base, int offset, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(base + static_cast<uint32_t>(offset) * 4),
               "f"(x), "f"(y));
}

}  // namespace krait::cuda
