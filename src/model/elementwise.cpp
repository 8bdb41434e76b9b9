#include "model/elementwise.h"

#include <cmath>

namespace krait {
namespace {

template <class F>
void for_ranges(int threads, int64_t size, F&& f) {
  parallel_ranges(threads, size, kElementwiseGrain, f);
}

template <class F>
void dispatch_storage(DType dtype, F&& f) {
  if (dtype == DType::f16) return f(TypeTag<f16>{});
  dispatch_float(dtype, f);
}

template <class From, class To>
void convert_as(int threads, const Tensor& from, const Tensor& to) {
  const From* in = from.ptr<From>();
  To* out = to.ptr<To>();
  for_ranges(threads, from.size(), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // The 16-bit types convert by way of float.
      using Middle = std::conditional_t<std::is_same_v<To, double>, Wide<From>, float>;
      out[i] = static_cast<To>(static_cast<Middle>(in[i]));
    }
  });
}

}  // namespace

void convert(int threads, const Tensor& from, const Tensor& to) {
  KRAIT_CHECK(from.contiguous() && to.contiguous() && from.size() == to.size());
  dispatch_storage(to.dtype, [&](auto out) {
    dispatch_storage(from.dtype, [&](auto in) {
      convert_as<typename decltype(in)::type, typename decltype(out)::type>(threads, from, to);
    });
  });
}

void negative_exp(int threads, const Tensor& A_log, const Tensor& A) {
  KRAIT_CHECK(A_log.contiguous() && A.contiguous() && A_log.size() == A.size());
  dispatch_float(A.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* in = A_log.ptr<T>();
    T* out = A.ptr<T>();
    for_ranges(threads, A.size(), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        out[i] = static_cast<T>(-std::exp(static_cast<Wide<T>>(in[i])));
    });
  });
}

void add_to(int threads, const Tensor& x, const Tensor& sum) {
  KRAIT_CHECK(x.contiguous() && sum.contiguous() && x.size() == sum.size());
  dispatch_float(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* in = x.ptr<T>();
    T* out = sum.ptr<T>();
    for_ranges(threads, x.size(), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        out[i] = static_cast<T>(static_cast<Wide<T>>(out[i]) + static_cast<Wide<T>>(in[i]));
    });
  });
}

void add_product(int threads, const Tensor& x, const Tensor& y, const Tensor& sum) {
  KRAIT_CHECK(x.contiguous() && y.contiguous() && sum.contiguous() && x.size() == sum.size());
  dispatch_float(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T *a = x.ptr<T>(), *b = y.ptr<T>();
    T* out = sum.ptr<T>();
    for_ranges(threads, x.size(), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        out[i] = static_cast<T>(static_cast<Wide<T>>(out[i]) +
                                static_cast<Wide<T>>(a[i]) * static_cast<Wide<T>>(b[i]));
    });
  });
}

// A row that every token shares is the bias of a linear layer.
void sum_rows(Context& ctx, const Tensor& x, const Tensor& vector) {
  const Tensor dy = x.reshape({x.shape[0], x.shape[2]});
  linear_bwd(ctx, {}, {.dy = dy, .dx = {}, .dweight = {}, .dbias = vector});
}

}  // namespace krait
