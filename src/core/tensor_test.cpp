#include "core/tensor.h"

#include <gtest/gtest.h>

#include <vector>

namespace krait {
namespace {

TEST(Tensor, SlicesShareMemory) {
  std::vector<float> memory(12);
  const Tensor t(memory.data(), DType::f32, {3, 4});
  const Tensor columns = t.slice(1, 1, 3);
  EXPECT_EQ(columns.row<float>(2), memory.data() + 9);
  EXPECT_FALSE(columns.contiguous());
  EXPECT_TRUE(t.slice(0, 1, 3).contiguous());
  EXPECT_EQ(shape_string(columns), "(3, 2) f32");
  EXPECT_THROW(t.slice(0, 2, 4), CheckFailure);
  EXPECT_THROW(t.ptr<double>(), CheckFailure);
  EXPECT_THROW(columns.reshape({6}), CheckFailure);
}

TEST(Tensor, NoneIsFalseAndAnEmptyTensorIsNot) {
  EXPECT_FALSE(Tensor());
  EXPECT_TRUE(Tensor(nullptr, DType::f32, {0, 4}));
}

TEST(Tensor, BroadcastRowsRepeatOneRow) {
  float row[2] = {1, 2};
  const Tensor t = broadcast_rows(Tensor(row, DType::f32, {2}), 5);
  EXPECT_EQ(t.row<float>(4)[1], 2.0f);
  EXPECT_EQ(t.size(), 10);
}

}  // namespace
}  // namespace krait
