#include "ops/op_test.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "hwy/highway.h"
#include "ops/cuda_engine.h"

namespace krait::op_test {
namespace {

// Where TestTensors are made, and how to wait for what may still be writing to them.
Memory* test_memory = &host_memory();
Context* pending = nullptr;

void wait() {
  if (pending) pending->engine().synchronize(*pending);
}

}  // namespace

void on_cuda(const std::function<void(Context&)>& body) {
  const Engine* engine = nullptr;
  try {
    engine = &cuda_engine();
  } catch (const Error& e) {
    GTEST_SKIP() << "no CUDA engine: " << e.what();
  }
  Context ctx(*engine, 1);
  test_memory = &engine->transfer_memory();
  pending = &ctx;
  struct Restore {
    ~Restore() {
      test_memory = &host_memory();
      pending = nullptr;
    }
  } restore;
  body(ctx);
  wait();
}

TestTensor::TestTensor(DType dtype, std::initializer_list<int64_t> shape, int64_t row_stride)
    : view_(nullptr, dtype, shape) {
  if (row_stride > 0) {
    KRAIT_CHECK(view_.rank >= 2 && row_stride >= view_.stride[0]);
    view_.stride[0] = row_stride;
  }
  const int64_t rows = view_.rank > 1 ? view_.shape[0] : 1;
  const int64_t row = view_.rank > 1 ? view_.stride[0] : view_.shape[0];
  const size_t bytes = static_cast<size_t>(rows * row) * size_of(dtype);
  pristine_.assign(bytes + 2 * guard_bytes(), std::byte{0xA5});
  memory_ = Buffer(pristine_.size(), *test_memory);
  std::memcpy(memory_.data(), pristine_.data(), pristine_.size());
  view_.data = static_cast<std::byte*>(memory_.data()) + guard_bytes();
  for_each_offset([&](int64_t offset) { set(offset, std::nan("")); });
}

template <class F>
void TestTensor::for_each_offset(F&& f) const {
  wait();
  const auto& n = view_.shape;
  const auto& s = view_.stride;
  const auto extent = [&](size_t d) {
    return static_cast<int>(d) < view_.rank ? n[d] : int64_t{1};
  };
  for (int64_t i = 0; i < extent(0); ++i)
    for (int64_t j = 0; j < extent(1); ++j)
      for (int64_t k = 0; k < extent(2); ++k)
        for (int64_t l = 0; l < extent(3); ++l) f(i * s[0] + j * s[1] + k * s[2] + l * s[3]);
}

namespace {

double get(const Tensor& t, int64_t offset) {
  switch (t.dtype) {
    case DType::f32:
      return static_cast<float*>(t.data)[offset];
    case DType::bf16:
      return static_cast<bf16*>(t.data)[offset];
    case DType::f64:
      return static_cast<double*>(t.data)[offset];
    case DType::i32:
      return static_cast<int32_t*>(t.data)[offset];
    case DType::i8:
      return static_cast<int8_t*>(t.data)[offset];
    default:
      KRAIT_CHECK(false, "no test tensor of this type");
  }
  return 0;
}

}  // namespace

void TestTensor::set(int64_t offset, double value) {
  switch (view_.dtype) {
    case DType::f32:
      static_cast<float*>(view_.data)[offset] = static_cast<float>(value);
      return;
    case DType::bf16:
      static_cast<bf16*>(view_.data)[offset] = bf16(value);
      return;
    case DType::f64:
      static_cast<double*>(view_.data)[offset] = value;
      return;
    case DType::i32:
      static_cast<int32_t*>(view_.data)[offset] =
          std::isnan(value) ? 0x3fffffff : static_cast<int32_t>(value);
      return;
    case DType::i8:
      static_cast<int8_t*>(view_.data)[offset] =
          std::isnan(value) ? int8_t{-128} : static_cast<int8_t>(value);
      return;
    default:
      KRAIT_CHECK(false, "no test tensor of this type");
  }
}

bool TestTensor::guards_intact() const {
  wait();
  const std::byte* bytes = static_cast<const std::byte*>(memory_.data());
  std::vector<std::byte> now(bytes, bytes + memory_.bytes());
  const size_t width = size_of(view_.dtype);
  for_each_offset([&](int64_t offset) {
    std::memset(now.data() + guard_bytes() + static_cast<size_t>(offset) * width, 0xA5, width);
  });
  return now == pristine_;
}

TestTensor& TestTensor::normal(Rng& rng, double sd, double mean) {
  for_each_offset([&](int64_t offset) { set(offset, mean + sd * rng.normal()); });
  return *this;
}
TestTensor& TestTensor::uniform(Rng& rng, double low, double high) {
  for_each_offset([&](int64_t offset) { set(offset, rng.uniform(low, high)); });
  return *this;
}
TestTensor& TestTensor::zero() {
  for_each_offset([&](int64_t offset) { set(offset, 0); });
  return *this;
}
TestTensor& TestTensor::values(const std::vector<double>& values) {
  KRAIT_CHECK(static_cast<int64_t>(values.size()) == view_.size());
  size_t i = 0;
  for_each_offset([&](int64_t offset) { set(offset, values[i++]); });
  return *this;
}
TestTensor& TestTensor::copy(const Tensor& other) { return values(op_test::to_double(other)); }
std::vector<double> TestTensor::to_double() const { return op_test::to_double(view_); }

std::vector<double> to_double(const Tensor& t) {
  wait();
  std::vector<double> out;
  out.reserve(static_cast<size_t>(t.size()));
  const auto extent = [&](size_t d) {
    return static_cast<int>(d) < t.rank ? t.shape[d] : int64_t{1};
  };
  const auto& s = t.stride;
  for (int64_t i = 0; i < extent(0); ++i)
    for (int64_t j = 0; j < extent(1); ++j)
      for (int64_t k = 0; k < extent(2); ++k)
        for (int64_t l = 0; l < extent(3); ++l)
          out.push_back(get(t, i * s[0] + j * s[1] + k * s[2] + l * s[3]));
  return out;
}

double relative_max(const std::vector<double>& actual, const std::vector<double>& expected) {
  KRAIT_CHECK(actual.size() == expected.size());
  double worst = 0, norm = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::abs(actual[i] - expected[i]);
    if (std::isnan(error)) return error;
    worst = std::max(worst, error);
    norm += expected[i] * expected[i];
  }
  return norm == 0 ? worst : worst / std::sqrt(norm / static_cast<double>(actual.size()));
}

::testing::AssertionResult close(const std::vector<double>& actual,
                                 const std::vector<double>& expected, double tolerance) {
  const double error = relative_rms(actual, expected);
  if (error <= tolerance) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "relative RMS error " << error << " > " << tolerance;
}

::testing::AssertionResult close_bf16(const Tensor& actual, const std::vector<double>& oracle,
                                      double slack) {
  std::vector<double> rounded = oracle;
  for (double& x : rounded) x = bf16(x);
  const double ideal = relative_rms(rounded, oracle),
               error = relative_rms(to_double(actual), oracle);
  if (error <= 2 * ideal + slack) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << "relative RMS error " << error << ", rounding alone gives " << ideal;
}

::testing::AssertionResult bitwise_equal(const Tensor& a, const Tensor& b) {
  const std::vector<double> x = to_double(a), y = to_double(b);
  if (x.size() != y.size()) return ::testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < x.size(); ++i)
    if (std::memcmp(&x[i], &y[i], sizeof(double)) != 0)
      return ::testing::AssertionFailure() << "element " << i << ": " << x[i] << " and " << y[i];
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult gradient_matches(const Tensor& input,
                                            const std::vector<double>& gradient,
                                            const std::function<double()>& objective, Rng& rng,
                                            double tolerance) {
  KRAIT_CHECK(input.dtype == DType::f64 && input.contiguous());
  const size_t n = static_cast<size_t>(input.size());
  KRAIT_CHECK(gradient.size() == n);
  double* x = input.ptr<double>();
  const std::vector<double> original(x, x + n);
  // Fourth-order central differences: the truncation error is O(step^4), so the step can be large
  // enough for rounding.
  const double step = 1e-3;
  for (int direction = 0; direction < 4; ++direction) {
    std::vector<double> d(n);
    double expected = 0, scale = 0;
    for (size_t i = 0; i < n; ++i) {
      d[i] = rng.normal();
      expected += gradient[i] * d[i];
      scale += gradient[i] * gradient[i];
    }
    const auto at = [&](double s) {
      for (size_t i = 0; i < n; ++i) x[i] = original[i] + s * d[i];
      return objective();
    };
    const double h = step / std::sqrt(static_cast<double>(n));
    const double measured = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
    std::copy(original.begin(), original.end(), x);
    const double allowed = tolerance * std::max(std::sqrt(scale), std::abs(expected)) + 1e-10;
    if (!(std::abs(measured - expected) <= allowed))
      return ::testing::AssertionFailure()
             << "directional derivative " << measured << ", gradient gives " << expected;
  }
  return ::testing::AssertionSuccess();
}

void for_each_simd_target(const std::function<void()>& body) {
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  const auto choose = [](int64_t mask) {
    hwy::SetSupportedTargetsForTest(mask);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  };
  for (auto target = targets.rbegin(); target != targets.rend(); ++target) {
    SCOPED_TRACE(hwy::TargetName(*target));
    choose(*target);
    body();
  }
  choose(0);
}

}  // namespace krait::op_test
