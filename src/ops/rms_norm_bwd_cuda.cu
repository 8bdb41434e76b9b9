// The norm's backward pass on a GPU, as its forward pass (rms_norm_cuda.cu); sums of dweight by
// blocks, then over these.
#include "ops/cuda/partial_sums.cuh"
#include "ops/rms_norm.cuh"

namespace krait::cuda {
namespace {

using namespace rms_norm;

template <class T, class R>
struct NormGrad {
  Stream<T, R> stream;
  Rows<T> dy, dx, y;
  Rows<R> dresidual;
  const float *weight, *rstd;
  float* partial;  // (parts, d_model): sums of dweight
  int64_t tokens, d_model;
};

// dr = rstd w dy - r rstd^3 / d_model sum_j w_j dy_j r_j, of which `scale` is all behind r.
template <int V>
__device__ Floats<V> gradient(float rstd, float scale, const Floats<V>& weighted_dy,
                              const Floats<V>& r) {
  Floats<V> dr;
#pragma unroll
  for (int k = 0; k < V; ++k) dr[k] = fmaf(rstd, weighted_dy[k], -r[k] * scale);
  return dr;
}

// y of V elements, as the forward pass gives it.
template <class T, class R, int V>
__device__ void give_output(const NormGrad<T, R>& op, int64_t token, int64_t i, float rstd,
                            const Floats<V>& weight, const Floats<V>& r) {
  if (!op.y) return;
  Floats<V> y;
#pragma unroll
  for (int k = 0; k < V; ++k) y[k] = r[k] * rstd * weight[k];
  store_vector(op.y.row(token) + i, y);
}

// dresidual and dx of V elements.
template <class T, class R, int V>
__device__ void give_gradient(const NormGrad<T, R>& op, int64_t token, int64_t i,
                              const Floats<V>& from_elsewhere, const Floats<V>& dr) {
  Floats<V> d;
#pragma unroll
  for (int k = 0; k < V; ++k) d[k] = from_elsewhere[k] + dr[k];
  store_vector(op.dresidual.row(token) + i, d);
  if (op.dx) store_vector(op.dx.row(token) + i, unpack(pack<R>(d)));
}

// Grid: blocks that stay, each taking every gridDim.x-th group of block_rows rows. On chip: the row
// in registers, and the thread's columns of dweight, which the block adds up over its rows in
// order. Moves residual, x, dy, dresidual (in and out), dx and y once: 18 bytes an element with
// bf16 and an f32 stream, 16 without y, 2 more for each x; so, H200, 65536 x 768: 0.211 ms (90 %
// of 4.25 TB/s), 8192 x 2560: 0.111 ms (71 %); bf16 stream 0.148 ms (80 %) and 0.074 ms (67 %).
template <class T, class R, int N>
__global__ void __launch_bounds__(kRmsMaxThreads)
    rms_norm_bwd_rows(const NormGrad<T, R> op, const int row_threads) {
  constexpr int V = kRmsVector;
  // dresidual comes in with the rest, unless registers are short.
  constexpr bool kEarly = sizeof(R) == 2;
  __shared__ float block_sums[32 * N * V];  // of rows within a warp
  const int lane = threadIdx.x % row_threads, group = threadIdx.x / row_threads;
  const int block_rows = blockDim.x / row_threads;
  const auto place = [&](int j) { return int64_t{lane + j * row_threads} * V; };
  Floats<V> dweight[N];
#pragma unroll
  for (int j = 0; j < N; ++j) dweight[j] = constant<V>(0);
  const int64_t step = int64_t{gridDim.x} * block_rows;
  for (int64_t first = int64_t{blockIdx.x} * block_rows; first < op.tokens; first += step) {
    const int64_t token = first + group;
    const bool active = token < op.tokens;  // all threads take part in the sums
    Packed<R, V> r[N], from_elsewhere[N];
    Packed<T, V> dy[N];
    const float rstd = active ? op.rstd[token] : 0;
    float dot = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!active || place(j) >= op.d_model) continue;
      dy[j] = load_packed<V>(op.dy.row(token) + place(j));
      if constexpr (kEarly) from_elsewhere[j] = load_packed<V>(op.dresidual.row(token) + place(j));
    }
    if (active) load_stream(r, op.stream, token, op.d_model, place);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!active || place(j) >= op.d_model) continue;
      const Floats<V> weight = load_vector<V>(op.weight + place(j)), d = unpack(dy[j]),
                      r_j = unpack(r[j]);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        dot = fmaf(weight[k] * d[k], r_j[k], dot);
        dweight[j][k] = fmaf(d[k], r_j[k] * rstd, dweight[j][k]);
      }
    }
    dot = row_sum(dot, row_threads);
    const float scale = rstd * rstd * rstd * (dot / static_cast<float>(op.d_model));
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!active || place(j) >= op.d_model) continue;
      const Floats<V> weight = load_vector<V>(op.weight + place(j));
      Floats<V> d = unpack(dy[j]);
#pragma unroll
      for (int k = 0; k < V; ++k) d[k] *= weight[k];
      give_output(op, token, place(j), rstd, weight, unpack(r[j]));
      if constexpr (!kEarly) from_elsewhere[j] = load_packed<V>(op.dresidual.row(token) + place(j));
      give_gradient<T, R, V>(op, token, place(j), unpack(from_elsewhere[j]),
                             gradient(rstd, scale, d, unpack(r[j])));
    }
  }
  float* const partial = op.partial + blockIdx.x * op.d_model;
  for (int turn = 0; turn < block_rows; ++turn) {
    const bool last = turn == block_rows - 1;
    if (turn == group) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int64_t i = place(j);
        if (i >= op.d_model) continue;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float sum = turn == 0 ? dweight[j][k] : block_sums[i + k] + dweight[j][k];
          (last ? partial : block_sums)[i + k] = sum;
        }
      }
    }
    if (!last) __syncthreads();  // the sums up to this group's are there
  }
}

// Grid: a block to a row of any width and alignment, read twice.
template <class T, class R>
__global__ void __launch_bounds__(kRmsGeneralThreads)
    rms_norm_bwd_general(const NormGrad<T, R> op) {
  const int64_t token = blockIdx.x;
  const float rstd = op.rstd[token];
  const auto weighted_dy = [&](int64_t i) {
    return constant<1>(op.weight[i] * load_vector<1>(op.dy.row(token) + i)[0]);
  };
  float dot = 0;
  for (int64_t i = threadIdx.x; i < op.d_model; i += kRmsGeneralThreads)
    dot = fmaf(weighted_dy(i)[0], stream_at(op.stream, token, i)[0], dot);
  dot = row_sum(dot, kRmsGeneralThreads);
  const float scale = rstd * rstd * rstd * (dot / static_cast<float>(op.d_model));
  for (int64_t i = threadIdx.x; i < op.d_model; i += kRmsGeneralThreads) {
    // y may stand where dy did, dx where an x did.
    const Floats<1> r = stream_at(op.stream, token, i);
    const Floats<1> dr = gradient(rstd, scale, weighted_dy(i), r);
    give_output(op, token, i, rstd, constant<1>(op.weight[i]), r);
    give_gradient<T, R, 1>(op, token, i, load_vector<1>(op.dresidual.row(token) + i), dr);
  }
}

// Grid: a thread owns a column of kRmsGeneralTokens rows.
template <class T, class R>
__global__ void __launch_bounds__(kRmsGeneralThreads)
    rms_norm_bwd_general_dweight(const NormGrad<T, R> op) {
  const int64_t i = int64_t{blockIdx.y} * kRmsGeneralThreads + threadIdx.x;
  if (i >= op.d_model) return;
  const int64_t begin = int64_t{blockIdx.x} * kRmsGeneralTokens;
  const int64_t end = min(begin + kRmsGeneralTokens, op.tokens);
  float sum = 0;
#pragma unroll 4
  for (int64_t t = begin; t < end; ++t)
    sum =
        fmaf(load_vector<1>(op.dy.row(t) + i)[0], stream_at(op.stream, t, i)[0] * op.rstd[t], sum);
  op.partial[blockIdx.x * op.d_model + i] = sum;
}

struct AddTo {
  float* sums;
  __device__ void operator()(int64_t i, float sum) const { sums[i] += sum; }
};

}  // namespace

void rms_norm_bwd(Context& ctx, const RmsNorm& op, const RmsNormGrad& grad) {
  const int64_t tokens = grad.dy.shape[0], d_model = grad.dy.shape[1];
  if (tokens == 0 || d_model == 0) return;
  const State& gpu = state_of(ctx);
  const Tensor& residual = op.residual_out ? op.residual_out : op.residual_in;
  const RmsNormPlan plan = plan_rms_norm(
      tokens, d_model,
      aligned(op, {&residual, &op.weight, &grad.dy, &grad.dresidual, &grad.dx, &grad.y}),
      residual.dtype == DType::bf16, gpu.multiprocessors);
  const auto grid = static_cast<unsigned>(plan.bwd_blocks);
  const int64_t parts =
      plan.in_registers ? plan.bwd_blocks : (tokens + kRmsGeneralTokens - 1) / kRmsGeneralTokens;
  const Arena::Scope scope(ctx.workspace());
  dispatch(grad.dy.dtype, residual.dtype, [&](auto t, auto r) {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    const NormGrad<T, R> args = {
        .stream = Stream<T, R>(op, residual, op.residual_out ? 0 : addends(op)),
        .dy = Rows<T>(grad.dy),
        .dx = Rows<T>(grad.dx),
        .y = Rows<T>(grad.y),
        .dresidual = Rows<R>(grad.dresidual),
        .weight = op.weight.ptr<float>(),
        .rstd = op.rstd.ptr<float>(),
        .partial = ctx.workspace().array<float>(parts * d_model),
        .tokens = tokens,
        .d_model = d_model};
    if (plan.in_registers) {
      const auto block = static_cast<unsigned>(plan.bwd.threads * plan.bwd.block_rows);
      auto kernel = rms_norm_bwd_rows<T, R, kRmsVectors>;
      if constexpr (sizeof(R) == 2)
        if (plan.bwd_vectors == 2) kernel = rms_norm_bwd_rows<T, R, 2>;
      kernel<<<grid, block, 0, gpu.stream>>>(args, plan.bwd.threads);
      check_launch("rms_norm_bwd_rows");
    } else {
      const dim3 columns(
          static_cast<unsigned>(parts),
          static_cast<unsigned>((d_model + kRmsGeneralThreads - 1) / kRmsGeneralThreads));
      rms_norm_bwd_general_dweight<T, R><<<columns, kRmsGeneralThreads, 0, gpu.stream>>>(args);
      check_launch("rms_norm_bwd_general_dweight");
      rms_norm_bwd_general<T, R><<<grid, kRmsGeneralThreads, 0, gpu.stream>>>(args);  // overwrites
      check_launch("rms_norm_bwd_general");
    }
    launch_add_partial_sums(gpu.stream, args.partial, parts, d_model,
                            AddTo{grad.dweight.ptr<float>()});
  });
}

}  // namespace krait::cuda
