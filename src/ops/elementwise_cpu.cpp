#include <cmath>
#include <cstring>

#include "core/convert.h"
#include "core/threads.h"
#include "ops/engine.h"

namespace krait::cpu {
namespace {

constexpr int64_t kGrain = int64_t{1} << 14;  // below it a thread costs more than it saves

}  // namespace

void fill_zero(Context&, const Tensor& x) { std::memset(x.data, 0, x.bytes()); }

void copy_elements(Context& ctx, const Tensor& from, const Tensor& to) {
  reference::copy_elements(ctx, from, to);  // memcpy
}

void round_elements(Context& ctx, const Tensor& from, const Tensor& to) {
  convert_on_host(ctx.threads(), from, to);
}

void negative_exp(Context& ctx, const Tensor& A_log, const Tensor& A) {
  const float* in = A_log.ptr<float>();
  float* out = A.ptr<float>();
  parallel_ranges(ctx.threads(), A.size(), kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = -std::exp(in[i]);
  });
}

void add_product(Context& ctx, const Tensor& x, const Tensor& y, const Tensor& sum) {
  const float *a = x.ptr<float>(), *b = y.ptr<float>();
  float* out = sum.ptr<float>();
  parallel_ranges(ctx.threads(), sum.size(), kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] += a[i] * b[i];
  });
}

void sum_elements(Context&, const Tensor& x, const Tensor& sum) {
  double total = 0;
  for (int64_t i = 0; i < x.size(); ++i) total += static_cast<double>(x.ptr<float>()[i]);
  *sum.ptr<double>() += total;
}

void clip_offsets(Context& ctx, const Tensor& offsets, int64_t begin, int64_t end,
                  const Tensor& clipped) {
  reference::clip_offsets(ctx, offsets, begin, end, clipped);  // a few
}

}  // namespace krait::cpu
