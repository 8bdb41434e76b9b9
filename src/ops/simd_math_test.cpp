// Accuracy of the vector functions on every SIMD target, against double.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/simd_math_test.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

enum Function { kExp2, kExp2Clamped, kExp, kLog1p, kSoftplus, kSigmoid };

void apply(int function, const float* x, float* y, size_t count) {
  const DF d;
  for_each_vector(count, [&](size_t i, size_t valid) {
    const VF v = load_part(d, x + i, valid);
    const VF one = hn::Set(d, 1.0f);
    VF r = sigmoid(d, v);
    if (function == kExp2) r = exp2_product(d, v, one);
    if (function == kExp2Clamped) r = exp2_product_clamped(d, v, one);
    if (function == kExp) r = exp_clamped(d, v);
    if (function == kLog1p) r = log1p_unit(d, v);
    if (function == kSoftplus) r = softplus(d, v);
    store_part(d, r, y + i, valid);
  });
}

bool has_fma() { return HWY_NATIVE_FMA != 0; }

void round_trip_bf16(const float* x, krait::bf16* y, float* z, size_t count) {
  const DF d;
  for_each_vector(count, [&](size_t i, size_t valid) {
    store_part(d, load_part(d, x + i, valid), y + i, valid);
    store_part(d, load_part(d, y + i, valid), z + i, valid);
  });
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cmath>

#include "ops/op_test.h"

namespace krait {
namespace {

HWY_EXPORT(apply);
HWY_EXPORT(has_fma);
HWY_EXPORT(round_trip_bf16);

enum Function { kExp2, kExp2Clamped, kExp, kLog1p, kSoftplus, kSigmoid };

std::vector<float> call(int function, const std::vector<float>& x) {
  std::vector<float> y(x.size());
  HWY_DYNAMIC_DISPATCH(apply)(function, x.data(), y.data(), x.size());
  return y;
}

// Largest |y - f(x)| in units of the last place of f(x).
double worst_ulp(int function, const std::vector<float>& x, double (*f)(double)) {
  const std::vector<float> y = call(function, x);
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = f(x[i]);
    const float nearest = static_cast<float>(std::abs(exact));
    const double ulp = std::nextafterf(nearest, INFINITY) - static_cast<double>(nearest);
    const double error = std::abs(y[i] - exact) / ulp;
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

std::vector<float> spread(double low, double high, size_t count) {
  Rng rng(5);
  std::vector<float> x(count);
  for (float& v : x) v = static_cast<float>(rng.uniform(low, high));
  return x;
}

TEST(SimdMath, Exp2IsWithinOneUlp) {
  op_test::for_each_simd_target([] {
    std::vector<float> small = spread(-30, -8, 20000);  // 2^-30 .. 2^-8, logarithmic: slow modes
    for (float& v : small) v = -std::exp2(v);
    const double bound = HWY_DYNAMIC_DISPATCH(has_fma)() ? 1.0 : 1.25;
    EXPECT_LE(worst_ulp(kExp2, spread(-126, 0, 200000), std::exp2), bound);
    EXPECT_LE(worst_ulp(kExp2Clamped, spread(-126, 0, 200000), std::exp2), bound);
    EXPECT_LE(worst_ulp(kExp2, spread(-2, 0, 200000), std::exp2), bound);
    EXPECT_LE(worst_ulp(kExp2, small, std::exp2), 0.51);
    EXPECT_EQ(call(kExp2, {0.0f, -1.0f, -10.0f}), (std::vector<float>{1.0f, 0.5f, 0x1p-10f}));
    for (float y : call(kExp2Clamped, {-127.0f, -1e3f, -1e30f, -INFINITY})) {
      EXPECT_GE(y, 0.0f);
      EXPECT_LE(y, 0x1p-125f);
    }
  });
}

TEST(SimdMath, ExpIsAccurate) {
  op_test::for_each_simd_target([] {
    EXPECT_LE(worst_ulp(kExp, spread(-86.9, 87.9, 200000), std::exp), 1.25);
    EXPECT_LE(worst_ulp(kExp, spread(-1, 1, 200000), std::exp), 1.25);
    EXPECT_TRUE(std::isnan(call(kExp, {NAN})[0]));
    EXPECT_TRUE(std::isfinite(call(kExp, {1e30f})[0]));
  });
}

TEST(SimdMath, SoftplusKeepsItsRelativeAccuracy) {
  const auto exact = [](double x) {
    return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
  };
  op_test::for_each_simd_target([&] {
    const double slack = HWY_DYNAMIC_DISPATCH(has_fma)() ? 0 : 1;
    EXPECT_LE(worst_ulp(kLog1p, spread(0, 1, 100000), std::log1p), 2.0 + slack);
    EXPECT_LE(worst_ulp(kSoftplus, spread(-80, 80, 200000), exact), 3.0 + slack);
    EXPECT_LE(worst_ulp(kSoftplus, spread(-3, 3, 200000), exact), 3.0 + slack);
    EXPECT_EQ(call(kSoftplus, {100.0f})[0], 100.0f);
    EXPECT_TRUE(std::isnan(call(kSoftplus, {NAN})[0]));
  });
}

TEST(SimdMath, SigmoidIsAccurateAndNeverOverflows) {
  op_test::for_each_simd_target([] {
    EXPECT_LE(worst_ulp(kSigmoid, spread(-80, 80, 200000),
                        [](double x) { return 1 / (1 + std::exp(-x)); }),
              3.0);
    EXPECT_EQ(call(kSigmoid, {1e4f})[0], 1.0f);
    EXPECT_LE(call(kSigmoid, {-1e4f})[0], 1e-37f);
  });
}

TEST(SimdMath, Bf16RoundsAsTheScalarTypeDoes) {
  op_test::for_each_simd_target([] {
    std::vector<float> x = spread(-1e3, 1e3, 1003);
    x[0] = NAN;
    x[1] = INFINITY;
    x[2] = 1.0f + 0x1p-8f;
    x[3] = 3.4e38f;
    std::vector<bf16> y(x.size());
    std::vector<float> z(x.size());
    HWY_DYNAMIC_DISPATCH(round_trip_bf16)(x.data(), y.data(), z.data(), x.size());
    EXPECT_TRUE(std::isnan(z[0]));
    for (size_t i = 1; i < x.size(); ++i) {
      EXPECT_EQ(y[i].bits, bf16(x[i]).bits);
      EXPECT_EQ(z[i], float(bf16(x[i])));
    }
  });
}

}  // namespace
}  // namespace krait
#endif  // HWY_ONCE
