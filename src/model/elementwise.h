// The few elementwise passes that the model makes between ops. Tensors are contiguous; work is
// shared by `threads`.
#pragma once

#include <type_traits>

#include "core/threads.h"
#include "ops/linear.h"

namespace krait {

inline constexpr int64_t kElementwiseGrain = int64_t{1}
                                             << 14;  // below it a thread costs more than it saves

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// to = from, converted between any of f32, bf16, f16 and f64,.
void convert(int threads, const Tensor& from, const Tensor& to);

// A = -exp(A_log); f32 or f64.
void negative_exp(int threads, const Tensor& A_log, const Tensor& A);

// sum += x; f32, bf16 or f64.
void add_to(int threads, const Tensor& x, const Tensor& sum);

// sum += x y; f32 or f64.
void add_product(int threads, const Tensor& x, const Tensor& y, const Tensor& sum);

// vector (width) += the sum of all rows of x (tokens, 1, width): the gradient of a row that every
// token shares.
void sum_rows(Context& ctx, const Tensor& x, const Tensor& vector);

}  // namespace krait
