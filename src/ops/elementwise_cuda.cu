// Passes over tensors on a GPU.
#include "ops/cuda/arguments.h"
#include "ops/cuda/double_sums.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/elementwise_plan.h"

namespace krait::cuda {
namespace {

// Grid: a thread owns V neighbouring elements. f(V, first element).
template <int V, class F>
__global__ void __launch_bounds__(kElementwiseThreads)
    elementwise_vectors(const int64_t count, const F f) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
  if (i + V <= count) {
    f(std::integral_constant<int, V>{}, i);
  } else {
    for (int64_t j = i; j < count; ++j) f(std::integral_constant<int, 1>{}, j);
  }
}

template <class F>
void for_each_element(Context& ctx, std::initializer_list<const Tensor*> tensors, const char* name,
                      const F& f) {
  const int64_t count = (*tensors.begin())->size();
  const bool vectors = std::ranges::all_of(tensors, [](auto t) { return aligned(*t); });
  const unsigned blocks =
      static_cast<unsigned>(elementwise_blocks(count, vectors ? kElementwiseVector : 1));
  const cudaStream_t stream = state_of(ctx).stream;
  if (vectors) {
    elementwise_vectors<kElementwiseVector><<<blocks, kElementwiseThreads, 0, stream>>>(count, f);
  } else {
    elementwise_vectors<1><<<blocks, kElementwiseThreads, 0, stream>>>(count, f);
  }
  check_launch(name);
}

struct Add {
  __device__ double operator()(double sum, double x) const { return sum + x; }
};

struct AddTo {
  double* to;
  __device__ void operator()(double sum) const { *to += sum; }
};

}  // namespace

void fill_zero(Context& ctx, const Tensor& x) {
  check(cudaMemsetAsync(x.data, 0, x.bytes(), state_of(ctx).stream), "clearing a tensor");
}

void copy_elements(Context& ctx, const Tensor& from, const Tensor& to) {
  const cudaStream_t stream = state_of(ctx).stream;
  if (from.contiguous() && to.contiguous()) {
    check(cudaMemcpyAsync(to.data, from.data, to.bytes(), cudaMemcpyDefault, stream),
          "copying a tensor");
    return;
  }
  const auto bytes = [&](int64_t elements) {
    return static_cast<size_t>(elements) * size_of(to.dtype);
  };
  check(cudaMemcpy2DAsync(to.data, bytes(to.stride[0]), from.data, bytes(from.stride[0]),
                          bytes(to.shape[1]), static_cast<size_t>(to.shape[0]), cudaMemcpyDefault,
                          stream),
        "copying a tensor's rows");
}

void round_elements(Context& ctx, const Tensor& from, const Tensor& to) {
  const float* in = from.ptr<float>();
  bf16* out = to.ptr<bf16>();
  for_each_element(ctx, {&from, &to}, "round_elements", [=] __device__(auto V, int64_t i) {
    store_vector(out + i, load_vector<V>(in + i));
  });
}

void negative_exp(Context& ctx, const Tensor& A_log, const Tensor& A) {
  const float* in = A_log.ptr<float>();
  float* out = A.ptr<float>();
  for_each_element(ctx, {&A_log, &A}, "negative_exp", [=] __device__(auto V, int64_t i) {
    Floats<V> x = load_vector<V>(in + i);
#pragma unroll
    for (int k = 0; k < V; ++k) x[k] = -expf(x[k]);  // CUDA's own: 1 ulp
    store_vector(out + i, x);
  });
}

void add_product(Context& ctx, const Tensor& x, const Tensor& y, const Tensor& sum) {
  const float *a = x.ptr<float>(), *b = y.ptr<float>();
  float* out = sum.ptr<float>();
  for_each_element(ctx, {&sum, &x, &y}, "add_product", [=] __device__(auto V, int64_t i) {
    const Floats<V> p = load_vector<V>(a + i), q = load_vector<V>(b + i);
    Floats<V> s = load_vector<V>(out + i);
#pragma unroll
    for (int k = 0; k < V; ++k) s[k] = fmaf(p[k], q[k], s[k]);
    store_vector(out + i, s);
  });
}

void sum_elements(Context& ctx, const Tensor& x, const Tensor& sum) {
  const cudaStream_t stream = state_of(ctx).stream;
  const Arena::Scope scope(ctx.workspace());
  const int64_t pieces = double_sum_blocks(x.size());
  double* const partial = ctx.workspace().array<double>(pieces);
  launch_double_sum_pieces(stream, x, partial, Add{});
  launch_double_sum_finish(stream, partial, pieces, AddTo{sum.ptr<double>()});
}

void clip_offsets(Context& ctx, const Tensor& offsets, int64_t begin, int64_t end,
                  const Tensor& clipped) {
  const int32_t* in = offsets.ptr<int32_t>();
  int32_t* out = clipped.ptr<int32_t>();
  const int32_t low = static_cast<int32_t>(begin), high = static_cast<int32_t>(end);
  for_each_element(ctx, {&clipped, &offsets}, "clip_offsets", [=] __device__(auto V, int64_t i) {
#pragma unroll
    for (int k = 0; k < V; ++k) out[i + k] = min(max(in[i + k], low), high) - low;
  });
}

}  // namespace krait::cuda
