#include "core/convert.h"

#include <type_traits>

#include "core/threads.h"

namespace krait {
namespace {

constexpr int64_t kGrain = int64_t{1} << 14;  // below it a thread costs more than it saves

template <class F>
void dispatch_storage(DType dtype, F&& f) {
  if (dtype == DType::f16) return f(TypeTag<f16>{});
  dispatch_float(dtype, f);
}

template <class From, class To>
void convert_as(int threads, const Tensor& from, const Tensor& to) {
  const From* in = from.ptr<From>();
  To* out = to.ptr<To>();
  using Wide = std::conditional_t<std::is_same_v<From, double>, double, float>;
  using Middle = std::conditional_t<std::is_same_v<To, double>, Wide, float>;
  parallel_ranges(threads, from.size(), kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = static_cast<To>(static_cast<Middle>(in[i]));
  });
}

}  // namespace

void convert_on_host(int threads, const Tensor& from, const Tensor& to) {
  KRAIT_CHECK(from.contiguous() && to.contiguous() && from.size() == to.size());
  dispatch_storage(to.dtype, [&](auto out) {
    dispatch_storage(from.dtype, [&](auto in) {
      convert_as<typename decltype(in)::type, typename decltype(out)::type>(threads, from, to);
    });
  });
}

}  // namespace krait
