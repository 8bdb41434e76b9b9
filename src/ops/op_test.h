// What the ops' tests share: tensors with guard words whose outputs start as NaN, seeded inputs,
// comparison by relative RMS, and a loop over every SIMD target of this CPU.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/rng.h"
#include "core/tensor.h"
#include "ops/context.h"
#include "ops/engine.h"
#include "ops/op_parity.h"

namespace krait::op_test {

// Runs body with the CUDA engine, or skips the test where there is none and says why. TestTensors
// made in the body live in memory that host and GPU both reach; reading or writing one waits for
// the GPU.
void on_cuda(const std::function<void(Context&)>& body);

// Owns its memory: rows of `row_stride` elements (>= the width), guard words in front, behind and
// in the gaps between rows.
class TestTensor {
 public:
  // row_stride 0: rows are dense. Every element starts as NaN (integers: as a large number).
  TestTensor(DType dtype, std::initializer_list<int64_t> shape, int64_t row_stride = 0);

  const Tensor& view() const { return view_; }
  operator const Tensor&() const { return view_; }
  bool guards_intact() const;

  TestTensor& normal(Rng& rng, double sd = 1, double mean = 0);
  TestTensor& uniform(Rng& rng, double low, double high);
  TestTensor& zero();
  TestTensor& values(const std::vector<double>& values);  // in logical order
  TestTensor& copy(const Tensor& other);  // same shape, any float type: rounds to this one
  std::vector<double> to_double() const;  // logical order, no gaps

 private:
  size_t guard_bytes() const { return 64; }
  Buffer memory_;
  std::vector<std::byte> pristine_;
  Tensor view_;
  void fill_guards();
  template <class F>
  void for_each_offset(F&& f) const;  // f(element offset from view_.data) in logical order
  void set(int64_t offset, double value);
};

std::vector<double> to_double(const Tensor&);

using krait::relative_rms;
// max |a - b| / rms(b).
double relative_max(const std::vector<double>& actual, const std::vector<double>& expected);

// Accepts iff relative_rms <= tolerance, so that NaN fails.
::testing::AssertionResult close(const std::vector<double>& actual,
                                 const std::vector<double>& expected, double tolerance);
inline ::testing::AssertionResult close(const Tensor& actual, const std::vector<double>& expected,
                                        double tolerance) {
  return close(to_double(actual), expected, tolerance);
}
// bf16 outputs: error of `actual` at most twice that of rounding `oracle` once to bf16 (plus
// `slack`, for sums in f32).
::testing::AssertionResult close_bf16(const Tensor& actual, const std::vector<double>& oracle,
                                      double slack = 1e-6);
::testing::AssertionResult bitwise_equal(const Tensor& a, const Tensor& b);

// Central differences in double: compares `gradient` with d objective / d input over random
// directions of `input` (f64). `objective` runs the forward pass with the current contents of input
// and returns a scalar.
::testing::AssertionResult gradient_matches(const Tensor& input,
                                            const std::vector<double>& gradient,
                                            const std::function<double()>& objective, Rng& rng,
                                            double tolerance = 1e-7);

// Runs body once for each SIMD target this CPU supports, the best last; the name is in the failure
// message.
void for_each_simd_target(const std::function<void()>& body);

}  // namespace krait::op_test
