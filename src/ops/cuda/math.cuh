// Elementary functions of kernels, by the special function unit (16 results per multiprocessor and
// clock) and the FMA pipe. Subnormals count as zero.
#pragma once

namespace krait::cuda {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;

// 2^x within 2 ulp; 0 from x = -126 down, infinity from 128 up.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp; 1 / infinity = 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(x) with a relative error of 2e-7 for every x: what rounding takes from log2(e) x, which alone
// would cost 1e-7 |x|, is put back.
__device__ __forceinline__ float exp_accurate(float x) {
  const float t = x * kLog2E, y = exp2_approx(t);
  return t > -126.f && t < 128.f ? fmaf(y, fmaf(-t, kLn2, x), y) : y;
}

// log(1 + e) for e in [0, 1], relative error 2e-7: e times a polynomial (minimax, 3e-8) on the FMA
// pipe, since log2 of 1 + e would lose a small e.
__device__ __forceinline__ float log1p_unit(float e) {
  float p = 0.00523267f;
  p = fmaf(p, e, -0.02950513f);
  p = fmaf(p, e, 0.07822578f);
  p = fmaf(p, e, -0.13663231f);
  p = fmaf(p, e, 0.19106f);
  p = fmaf(p, e, -0.2484298f);
  p = fmaf(p, e, 0.33319097f);
  p = fmaf(p, e, -0.49999493f);
  p = fmaf(p, e, 0.99999997f);
  return p * e;
}

// log(1 + exp(x)): exp(x) for very negative x, x for large x, finite for every finite x.
__device__ __forceinline__ float softplus(float x) {
  const float a = -fabsf(x), t = a * kLog2E, y = exp2_approx(t);
  const float e = fmaf(y, fmaf(t, -kLn2, a), y);  // as in exp_accurate
  return fmaxf(x, 0.f) + log1p_unit(e);
}

// 1 / (1 + exp(-x)), relative error 2e-7 for |x| < 5, then 1e-7 |x| below.
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal_approx(1.f + exp2_approx(-kLog2E * x));
}

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

}  // namespace krait::cuda
