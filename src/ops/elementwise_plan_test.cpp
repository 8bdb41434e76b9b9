#include "ops/elementwise_plan.h"

#include <gtest/gtest.h>

#include "ops/adamw_plan.h"
#include "ops/double_sums_plan.h"

namespace krait::cuda {
namespace {

// Blocks of `elements` cover `size` and none is idle.
void check_cover(int64_t blocks, int64_t elements, int64_t size) {
  EXPECT_GE(blocks * elements, size);
  EXPECT_LT((blocks - 1) * elements, size);
}

TEST(ElementwisePlan, BlocksCoverTheTensor) {
  for (int64_t size : {int64_t{1}, int64_t{255}, int64_t{2048}, int64_t{2049}, int64_t{16385},
                       (int64_t{1} << 31) + 5}) {
    for (int vector : {1, kElementwiseVector})
      check_cover(elementwise_blocks(size, vector), int64_t{kElementwiseThreads} * vector, size);
    check_cover(adamw_blocks(size), int64_t{kAdamwThreads} * kAdamwVector, size);
    check_cover(double_sum_blocks(size), kDoubleSumPiece, size);
  }
  EXPECT_EQ(double_sum_blocks(0), 0);
}

}  // namespace
}  // namespace krait::cuda
