// What the norm's passes on a GPU have in common: the residual stream as a sum, whose row lies in
// the registers of a few threads. Included by rms_norm_cuda.cu and rms_norm_bwd_cuda.cu only.
#pragma once

#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/rms_norm_plan.h"

namespace krait::cuda::rms_norm {

constexpr unsigned kAllLanes = 0xffffffffu;

// A matrix whose rows may be strided; none: null.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  Rows() = default;
  explicit Rows(const Tensor& t) {
    if (!t) return;
    data = t.ptr<T>();
    stride = t.stride[0];
  }
  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ T* row(int64_t i) const { return data + i * stride; }
};

// The residual stream r, as a sum.
template <class T, class R>
struct Stream {
  Rows<R> residual;
  Rows<T> x[kMaxAddends];
  int addends = 0;

  Stream(const RmsNorm& op, const Tensor& from, int count) : residual(from), addends(count) {
    for (int k = 0; k < count; ++k) x[k] = Rows<T>(op.x[static_cast<size_t>(k)]);
  }
};

// The sum over `threads` neighbouring threads, to all of them: part of a warp, or a block's whole
// warps. The order is fixed.
__device__ inline float row_sum(float sum, int threads) {
  for (int offset = min(threads, 32) / 2; offset > 0; offset /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (threads <= 32) return sum;
  __shared__ float warps[kRmsMaxThreads / 32];
  __syncthreads();  // the last row's sums have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();  // every warp's sum is there
  sum = 0;
  for (int w = 0; w < threads / 32; ++w) sum += warps[w];
  return sum;
}

// r += x, as it is kept: rounded to R.
template <class T, class R, int V>
__device__ void add_to(Packed<R, V>& r, const Packed<T, V>& x) {
  Floats<V> sum = unpack(r);
  const Floats<V> added = unpack(x);
#pragma unroll
  for (int k = 0; k < V; ++k) sum[k] += added[k];
  r = pack<R>(sum);
}

// A thread's vectors of a row of the stream. place(j): where vector j begins, at or beyond `width`
// where there is none. Of an x two are on their way at once: with four registers run out.
template <class T, class R, int V, int N, class Place>
__device__ void load_stream(Packed<R, V> (&r)[N], const Stream<T, R>& s, int64_t token,
                            int64_t width, const Place& place) {
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (place(j) < width) r[j] = load_packed<V>(s.residual.row(token) + place(j));
#pragma unroll 1
  for (int k = 0; k < s.addends; ++k) {
    const T* const from = s.x[k].row(token);
#pragma unroll
    for (int first = 0; first < N; first += 2) {
      Packed<T, V> x[2];
#pragma unroll
      for (int j = first; j < min(first + 2, N); ++j)
        if (place(j) < width) x[j - first] = load_packed<V>(from + place(j));
#pragma unroll
      for (int j = first; j < min(first + 2, N); ++j)
        if (place(j) < width) add_to(r[j], x[j - first]);
    }
  }
}

// One element of it.
template <class T, class R>
__device__ Floats<1> stream_at(const Stream<T, R>& s, int64_t token, int64_t i) {
  Packed<R, 1> r[1];
  load_stream(r, s, token, i + 1, [=](int) { return i; });
  return unpack(r[0]);
}

inline bool aligned(const RmsNorm& op, std::initializer_list<const Tensor*> tensors) {
  return std::ranges::all_of(op.x, [](const Tensor& t) { return vector_rows(t, kRmsVector); }) &&
         std::ranges::all_of(tensors, [](auto t) { return vector_rows(*t, kRmsVector); });
}

// f(T{}, R{}) for the three pairs there are.
template <class F>
void dispatch(DType type, DType residual, F&& f) {
  if (type == DType::f32) return f(TypeTag<float>{}, TypeTag<float>{});
  dispatch_f32_bf16(residual, [&](auto r) { f(TypeTag<bf16>{}, r); });
}

}  // namespace krait::cuda::rms_norm
