#include "ops/elementwise.h"

#include <limits>

#include "ops/check.h"
#include "ops/engine.h"

namespace krait {
namespace {

void check_pair(const Tensor& a, const Tensor& b) {
  KRAIT_CHECK(a.contiguous() && b.contiguous() && a.size() == b.size(),
              shape_string(a) + " and " + shape_string(b));
}

bool strided_rows(const Tensor& t) {
  return t.rank == 2 && t.stride[1] == 1 && t.stride[0] >= t.shape[1];
}

void check_full(const Tensor& a, const Tensor& b) {
  check_pair(a, b);
  KRAIT_CHECK(a.dtype == b.dtype && a.dtype == full_precision(a));
}

}  // namespace

void fill_zero(Context& ctx, const Tensor& x) {
  KRAIT_CHECK(x.contiguous());
  if (x.size() > 0) ctx.engine().fill_zero(ctx, x);
}

void copy_elements(Context& ctx, const Tensor& from, const Tensor& to) {
  if (from.rank == 2 && !(from.contiguous() && to.contiguous())) {
    KRAIT_CHECK(strided_rows(from) && strided_rows(to) && from.shape == to.shape,
                shape_string(from) + " and " + shape_string(to));
  } else {
    check_pair(from, to);
  }
  KRAIT_CHECK(from.dtype == to.dtype);
  if (to.size() > 0) ctx.engine().copy_elements(ctx, from, to);
}

void round_elements(Context& ctx, const Tensor& from, const Tensor& to) {
  check_pair(from, to);
  KRAIT_CHECK(from.dtype == DType::f32 && to.dtype == DType::bf16);
  if (to.size() > 0) ctx.engine().round_elements(ctx, from, to);
}

void negative_exp(Context& ctx, const Tensor& A_log, const Tensor& A) {
  check_full(A_log, A);
  if (A.size() > 0) ctx.engine().negative_exp(ctx, A_log, A);
}

void add_product(Context& ctx, const Tensor& x, const Tensor& y, const Tensor& sum) {
  check_full(x, y);
  check_full(x, sum);
  if (sum.size() > 0) ctx.engine().add_product(ctx, x, y, sum);
}

void sum_elements(Context& ctx, const Tensor& x, const Tensor& sum) {
  KRAIT_CHECK(x.contiguous() && x.dtype == DType::f32, shape_string(x));
  check_tensor(sum, "sum", DType::f64, {1});
  if (x.size() > 0) ctx.engine().sum_elements(ctx, x, sum);
}

void clip_offsets(Context& ctx, const Tensor& offsets, int64_t begin, int64_t end,
                  const Tensor& clipped) {
  check_tensor(offsets, "offsets", DType::i32, {-1});
  check_tensor(clipped, "clipped", DType::i32, {offsets.shape[0]});
  check_pair(offsets, clipped);
  KRAIT_CHECK(0 <= begin && begin <= end && end <= std::numeric_limits<int32_t>::max());
  if (offsets.size() > 0) ctx.engine().clip_offsets(ctx, offsets, begin, end, clipped);
}

}  // namespace krait
