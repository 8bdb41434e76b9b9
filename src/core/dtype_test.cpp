#include "core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace krait {
namespace {

TEST(Bf16, RoundsToNearestEven) {
  EXPECT_EQ(float(bf16(1.0f)), 1.0f);
  EXPECT_EQ(float(bf16(1.0f + 0x1p-8f)), 1.0f);                    // tie, to even
  EXPECT_EQ(float(bf16(1.0f + 3 * 0x1p-8f)), 1.0f + 4 * 0x1p-8f);  // tie, to even
  EXPECT_EQ(float(bf16(1.0f + 0x1.8p-8f)), 1.0f + 0x1p-7f);
  EXPECT_TRUE(std::isnan(float(bf16(std::nanf("")))));
  EXPECT_TRUE(std::isinf(float(bf16(std::numeric_limits<float>::infinity()))));
}

TEST(F16, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t i = 0; i < 65536; ++i) {
    f16 x;
    x.bits = static_cast<uint16_t>(i);
    const float f = x;
    if (std::isnan(f)) {
      EXPECT_TRUE(std::isnan(float(f16(f))));
    } else {
      EXPECT_EQ(f16(f).bits, x.bits) << i;
    }
  }
}

TEST(F16, RoundsToNearestEvenAtEveryMidpoint) {
  for (uint32_t i = 0; i < 0x7bff; ++i) {
    f16 low, high;
    low.bits = static_cast<uint16_t>(i);
    high.bits = static_cast<uint16_t>(i + 1);
    const float middle = (float(low) + float(high)) / 2;
    EXPECT_EQ(f16(middle).bits, i % 2 == 0 ? i : i + 1) << i;
    EXPECT_EQ(f16(std::nextafterf(middle, 1e9f)).bits, i + 1) << i;
  }
  EXPECT_EQ(f16(65519.0f).bits, 0x7bff);
  EXPECT_EQ(f16(65520.0f).bits, 0x7c00);
}

TEST(DType, NamesRoundTripAndUnknownOnesAreRefused) {
  EXPECT_EQ(dtype_from_name("bf16"), DType::bf16);
  EXPECT_THROW(dtype_from_name("fp8"), Error);
}

}  // namespace
}  // namespace krait
