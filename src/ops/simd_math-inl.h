// Vector vocabulary of the CPU engine, compiled once for each SIMD target: exp2, exp, softplus,
// sigmoid, and loads and stores that convert f32 and bf16. Include it after hwy/highway.h inside a
// foreach_target file. Accuracies are tested in simd_math_test.cpp.

// Highway's per-target include guard.
#if defined(KRAIT_OPS_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_SIMD_MATH_INL_H_
#undef KRAIT_OPS_SIMD_MATH_INL_H_
#else
#define KRAIT_OPS_SIMD_MATH_INL_H_
#endif

#include <cstring>

#include "core/tensor.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
constexpr size_t kLanes =
    hn::MaxLanes(DF());  // known when compiling: scalable vectors are not used

// 2^k for k given as float in the low bits of (k + 1.5 2^23), multiplied onto p by adding to its
// exponent.
HWY_INLINE VF scale_by_power(DF d, VF p, VF k_shifted) {
  const hn::RebindToSigned<DF> di;
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, k_shifted))));
}

// 1 + r q(r) = 2^r for |r| <= 1/2; q is the minimax polynomial of degree 5, relative error 1.9e-9.
HWY_INLINE VF exp2_fraction(DF d, VF r) {
  VF q = hn::Set(d, 0.000154762795163f);
  q = hn::MulAdd(q, r, hn::Set(d, 0.00134002352457f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.00961800397812f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.055503279092f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.24022651345f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.693147206159f));
  return hn::MulAdd(q, r, hn::Set(d, 1.0f));
}

// 2^(a b) for a b in [-126, 0] within 1 ulp (1.25 without FMA): the scan's inner loop, 11
// operations. The product is not rounded before its integer part is taken off. Outside the range:
// nonsense.
HWY_INLINE VF exp2_product(DF d, VF a, VF b) {
  const VF shift = hn::Set(d, 12582912.0f);  // 1.5 2^23: adding it rounds to an integer
  const VF shifted = hn::MulAdd(a, b, shift);
  const VF r = hn::MulSub(a, b, hn::Sub(shifted, shift));
  return scale_by_power(d, exp2_fraction(d, r), shifted);
}

// The same for any a b <= 0: below 2^-126 it gives 2^-126, which a flushed product turns to zero.
HWY_INLINE VF exp2_product_clamped(DF d, VF a, VF b) {
  const VF shift = hn::Set(d, 12582912.0f);
  const VF x = hn::Max(hn::Mul(a, b), hn::Set(d, -126.0f));
  const VF shifted = hn::Add(x, shift);
  return scale_by_power(d, exp2_fraction(d, hn::Sub(x, hn::Sub(shifted, shift))), shifted);
}

// a / b within 1 ulp for b in [1, 4]: the reciprocal's estimate and two corrections, several times
// faster than a division.
HWY_INLINE VF divide_moderate(DF d, VF a, VF b) {
  VF r = hn::ApproximateReciprocal(b);
  r = hn::Mul(r, hn::NegMulAdd(b, r, hn::Set(d, 2.0f)));
  const VF q = hn::Mul(a, r);
  return hn::MulAdd(hn::NegMulAdd(b, q, a), r, q);
}

// e^x within 1.25 ulp for x in [-87, 88]; outside clamped to that range. NaN stays NaN.
HWY_INLINE VF exp_clamped(DF d, VF x) {
  const VF shift = hn::Set(d, 12582912.0f);
  const VF t = hn::Min(hn::Max(x, hn::Set(d, -87.0f)), hn::Set(d, 88.0f));
  const VF shifted = hn::MulAdd(t, hn::Set(d, 1.44269504f), shift);
  const VF k = hn::Sub(shifted, shift);
  VF r = hn::NegMulAdd(k, hn::Set(d, 0.693359375f),
                       t);  // ln 2 in two parts: k times the first is exact
  r = hn::NegMulAdd(k, hn::Set(d, -2.12194440e-4f), r);
  VF q = hn::Set(d, 0.00139544891543f);
  q = hn::MulAdd(q, r, hn::Set(d, 0.00837500467983f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.0416661245508f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.166664176207f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.50000001351f));
  q = hn::MulAdd(q, hn::Mul(r, r), r);
  const VF y = scale_by_power(d, hn::Add(q, hn::Set(d, 1.0f)), shifted);
  return hn::IfThenElse(hn::IsNaN(x), x, y);
}

// log(1 + e) for e in [0, 1], relative error 2 ulp: 2 atanh(e / (2 + e)), no cancellation however
// small e is.
HWY_INLINE VF log1p_unit(DF d, VF e) {
  const VF t = divide_moderate(d, e, hn::Add(e, hn::Set(d, 2.0f)));
  const VF s = hn::Mul(t, t);
  VF q = hn::Set(d, 0.122124544061f);
  q = hn::MulAdd(q, s, hn::Set(d, 0.10694980282f));
  q = hn::MulAdd(q, s, hn::Set(d, 0.143105210504f));
  q = hn::MulAdd(q, s, hn::Set(d, 0.199993390992f));
  q = hn::MulAdd(q, s, hn::Set(d, 0.33333339742f));
  const VF t2 = hn::Add(t, t);
  return hn::MulAdd(hn::Mul(q, s), t2, t2);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|).
HWY_INLINE VF softplus(DF d, VF x) {
  const VF tail = log1p_unit(d, exp_clamped(d, hn::Neg(hn::Abs(x))));
  return hn::Add(hn::Max(x, hn::Zero(d)), tail);
}

// 1 / (1 + e^-x), from e^-|x| <= 1 so that nothing overflows.
HWY_INLINE VF sigmoid(DF d, VF x) {
  const VF e = exp_clamped(d, hn::Neg(hn::Abs(x)));
  const VF one = hn::Set(d, 1.0f);
  return divide_moderate(d, hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one), hn::Add(one, e));
}

HWY_INLINE VF silu(DF d, VF x) { return hn::Mul(x, sigmoid(d, x)); }

HWY_INLINE VF load_f32(DF d, const float* HWY_RESTRICT p) { return hn::LoadU(d, p); }

HWY_INLINE VF load_f32(DF d, const bf16* HWY_RESTRICT p) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::RebindToUnsigned<DF> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

HWY_INLINE VF load_f32(DF d, const int8_t* HWY_RESTRICT p) {
  const hn::Rebind<int8_t, DF> d8;
  const hn::RebindToSigned<DF> d32;
  return hn::ConvertTo(d, hn::PromoteTo(d32, hn::LoadU(d8, p)));
}

HWY_INLINE void store_f32(DF d, VF x, float* HWY_RESTRICT p) { hn::StoreU(x, d, p); }

// Rounds to nearest even; a NaN becomes the quiet NaN.
HWY_INLINE void store_f32(DF, VF x, bf16* HWY_RESTRICT p) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::RebindToUnsigned<DF> d32;
  const hn::RebindToSigned<DF> di;
  const auto u = hn::BitCast(d32, x);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(d32, 1u));
  auto high = hn::ShiftRight<16>(hn::Add(hn::Add(u, hn::Set(d32, 0x7fffu)), odd));
  high = hn::IfThenElse(hn::RebindMask(d32, hn::IsNaN(x)), hn::Set(d32, 0x7fc0u), high);
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, high)), d16, reinterpret_cast<uint16_t*>(p));
}

// The first `count` lanes only; the rest read as zero, and are not written.
template <class T>
HWY_INLINE VF load_f32_n(DF d, const T* HWY_RESTRICT p, size_t count) {
  HWY_ALIGN T lanes[kLanes] = {};
  std::memcpy(static_cast<void*>(lanes), p, count * sizeof(T));
  return load_f32(d, lanes);
}
template <class T>
HWY_INLINE void store_f32_n(DF d, VF x, T* HWY_RESTRICT p, size_t count) {
  HWY_ALIGN T lanes[kLanes];
  store_f32(d, x, lanes);
  std::memcpy(static_cast<void*>(p), lanes, count * sizeof(T));
}

// Asks for columns [begin, begin + count) of rows [first, last) of x ahead of their use: rows lie
// too far apart for the hardware to guess the next one.
template <class T>
HWY_INLINE void prefetch_rows(const krait::Tensor& x, int64_t first, int64_t last, int64_t begin,
                              int64_t count) {
  if (!x) return;
  for (int64_t t = first; t < last; ++t) {
    const char* row = reinterpret_cast<const char*>(x.row<T>(t) + begin);
    for (size_t i = 0; i < static_cast<size_t>(count) * sizeof(T); i += 64) hwy::Prefetch(row + i);
  }
}

// f(i, full) for vectors at i = 0, lanes, ..; the last one may reach beyond `count`: `lanes` of it
// are valid.
template <class F>
HWY_INLINE void for_each_vector(size_t count, F&& f) {
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
  if (i < count) f(i, count - i);
}
// Load or store that is whole when valid == kLanes, partial else.
template <class T>
HWY_INLINE VF load_part(DF d, const T* HWY_RESTRICT p, size_t valid) {
  return valid == kLanes ? load_f32(d, p) : load_f32_n(d, p, valid);
}
template <class T>
HWY_INLINE void store_part(DF d, VF x, T* HWY_RESTRICT p, size_t valid) {
  if (valid == kLanes) return store_f32(d, x, p);
  store_f32_n(d, x, p, valid);
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
