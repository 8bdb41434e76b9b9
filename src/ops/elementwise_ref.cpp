#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/convert.h"
#include "ops/engine.h"

namespace krait::reference {

void fill_zero(Context&, const Tensor& x) { std::memset(x.data, 0, x.bytes()); }

void copy_elements(Context&, const Tensor& from, const Tensor& to) {
  if (from.contiguous() && to.contiguous()) {
    std::memcpy(to.data, from.data, to.bytes());
    return;
  }
  const size_t width = size_of(to.dtype);
  for (int64_t i = 0; i < to.shape[0]; ++i)
    std::memcpy(
        static_cast<std::byte*>(to.data) + static_cast<size_t>(i * to.stride[0]) * width,
        static_cast<const std::byte*>(from.data) + static_cast<size_t>(i * from.stride[0]) * width,
        static_cast<size_t>(to.shape[1]) * width);
}

void round_elements(Context&, const Tensor& from, const Tensor& to) {
  convert_on_host(1, from, to);
}

void negative_exp(Context&, const Tensor& A_log, const Tensor& A) {
  dispatch_float(A.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = 0; i < A.size(); ++i)
      A.ptr<T>()[i] = static_cast<T>(-std::exp(static_cast<double>(A_log.ptr<T>()[i])));
  });
}

void add_product(Context&, const Tensor& x, const Tensor& y, const Tensor& sum) {
  dispatch_float(sum.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = 0; i < sum.size(); ++i)
      sum.ptr<T>()[i] =
          static_cast<T>(static_cast<double>(sum.ptr<T>()[i]) +
                         static_cast<double>(x.ptr<T>()[i]) * static_cast<double>(y.ptr<T>()[i]));
  });
}

void sum_elements(Context&, const Tensor& x, const Tensor& sum) {
  double total = 0;
  for (int64_t i = 0; i < x.size(); ++i) total += static_cast<double>(x.ptr<float>()[i]);
  *sum.ptr<double>() += total;
}

void clip_offsets(Context&, const Tensor& offsets, int64_t begin, int64_t end,
                  const Tensor& clipped) {
  for (int64_t i = 0; i < clipped.size(); ++i)
    clipped.ptr<int32_t>()[i] =
        static_cast<int32_t>(std::clamp(int64_t{offsets.ptr<int32_t>()[i]}, begin, end) - begin);
}

}  // namespace krait::reference
