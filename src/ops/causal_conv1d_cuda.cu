// The causal convolution on a GPU. Token-major: the lanes of a warp lie along channels, a thread
// walks tokens with the last inputs in registers, so that every input is read once from memory (the
// few tokens at a run's edge are read again, from L2).
#include "ops/causal_conv1d_plan.h"
#include "ops/cuda/math.cuh"
#include "ops/cuda/partial_sums.cuh"
#include "ops/cuda/sequences.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"

namespace krait::cuda {
namespace {

constexpr int kBefore = kConvTaps - 1;  // inputs before the current one
constexpr int kTogether = 4;            // tokens whose loads are in flight at once

template <class T>
struct Conv {
  const T* x;
  const float *weight, *bias;
  const int32_t *seq_start, *slot;
  float* state;
  T* y;
  int64_t x_stride, y_stride;
  int64_t tokens, d_inner;
  int num_seqs, d_conv;
  bool silu;

  __device__ int64_t state_row(int sequence, int row) const {
    const int64_t s = slot ? slot[sequence] : sequence;
    return (s * (d_conv - 1) + row) * d_inner;
  }
};

template <class T>
struct ConvGrad {
  const T* dy;
  T* dx;
  float* dstate;
  float* partial;  // (token_blocks, kConvQuantities, d_inner)
  int64_t dy_stride, dx_stride;
};

// Weights and bias of V channels, d_conv < 4 with zeros in front.
template <int V>
struct Taps {
  Floats<V> weight[kConvTaps], bias;

  template <class T>
  __device__ Taps(const Conv<T>& op, int64_t channel) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int k = 0; k < kConvTaps; ++k) {
        const int tap = k - (kConvTaps - op.d_conv);
        weight[k][i] = tap >= 0 ? op.weight[(channel + i) * op.d_conv + tap] : 0.0f;
      }
      bias[i] = op.bias ? op.bias[channel + i] : 0.0f;
    }
  }
  // One order for every pass, so that whole = split = step by step, bit for bit. x[0] is the
  // oldest.
  __device__ float convolve(int i, float x0, float x1, float x2, float x3) const {
    float s = fmaf(weight[0][i], x0, bias[i]);
    s = fmaf(weight[1][i], x1, s);
    s = fmaf(weight[2][i], x2, s);
    return fmaf(weight[3][i], x3, s);
  }
};

// Input t of a sequence that starts at `begin`; before that, of its initial state.
template <int V, class T>
__device__ Floats<V> input_at(const Conv<T>& op, int sequence, int64_t begin, int64_t t,
                              int64_t channel) {
  if (t >= begin) return load_vector<V>(op.x + t * op.x_stride + channel);
  const int row = op.d_conv - 1 + static_cast<int>(t - begin);
  if (!op.state || row < 0) return constant<V>(0);
  return load_vector<V>(op.state + op.state_row(sequence, row) + channel);
}

// Grid: token_blocks x channel_blocks, a thread owns V channels of a run of tokens. On chip: a
// thread's last inputs. Moves x and y once: 4 bytes an element in bf16.
template <class T, int V>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_fwd_runs(const Conv<T> op, const int run) {
  const int64_t channel = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  int64_t t = (int64_t{blockIdx.x} * blockDim.y + threadIdx.y) * run;
  if (channel >= op.d_inner || t >= op.tokens) return;
  const int64_t run_end = min(t + run, op.tokens);
  const Taps<V> taps(op, channel);
  const T* x = op.x + channel;
  T* y = op.y + channel;
  Floats<V> x0, x1, x2;  // oldest first
  const auto step = [&](int64_t at, const Packed<T, V>& in) {
    const Floats<V> x3 = unpack(in);
    Floats<V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float s = taps.convolve(i, x0[i], x1[i], x2[i], x3[i]);
      out[i] = op.silu ? silu(s) : s;
    }
    store_vector(y + at * op.y_stride, out);
    x0 = x1, x1 = x2, x2 = x3;
  };
  for (int sequence = sequence_of(op.seq_start, op.num_seqs, t); t < run_end; ++sequence) {
    const int64_t begin = op.seq_start[sequence];
    const int64_t end = min(run_end, int64_t{op.seq_start[sequence + 1]});
    if (t >= end) continue;  // an empty sequence
    x0 = input_at<V>(op, sequence, begin, t - 3, channel);
    x1 = input_at<V>(op, sequence, begin, t - 2, channel);
    x2 = input_at<V>(op, sequence, begin, t - 1, channel);
    for (; t + kTogether <= end; t += kTogether) {
      Packed<T, V> in[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) in[u] = load_packed<V>(x + (t + u) * op.x_stride);
#pragma unroll
      for (int u = 0; u < kTogether; ++u) step(t + u, in[u]);
    }
    for (; t < end; ++t) step(t, load_packed<V>(x + t * op.x_stride));
  }
}

// Grid: a thread owns a channel of a sequence. After fwd_runs, whose blocks read the initial
// states.
template <class T>
__global__ void causal_conv1d_final_state(const Conv<T> op) {
  const int64_t id = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (id >= op.num_seqs * op.d_inner) return;
  const int sequence = static_cast<int>(id / op.d_inner);
  const int64_t channel = id % op.d_inner;
  const int64_t begin = op.seq_start[sequence], end = op.seq_start[sequence + 1];
  float last[kBefore];
  const int rows = op.d_conv - 1;
#pragma unroll
  for (int i = 0; i < kBefore; ++i)
    if (i < rows) last[i] = input_at<1>(op, sequence, begin, end - rows + i, channel)[0];
#pragma unroll
  for (int i = 0; i < kBefore; ++i)
    if (i < rows) op.state[op.state_row(sequence, i) + channel] = last[i];
}

// Grid: a thread owns a channel of a sequence and moves its window on by one token.
template <class T>
__global__ void causal_conv1d_step_channels(const Conv<T> op) {
  const int64_t id = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (id >= op.tokens * op.d_inner) return;
  const int sequence = static_cast<int>(id / op.d_inner);
  const int64_t channel = id % op.d_inner;
  const Taps<1> taps(op, channel);
  const int rows = op.d_conv - 1;
  float* state = op.state + op.state_row(sequence, 0) + channel;
  float x[kConvTaps];
#pragma unroll
  for (int i = 0; i < kBefore; ++i) {
    const int row = i - (kBefore - rows);
    x[i] = row >= 0 ? state[row * op.d_inner] : 0.0f;
  }
  x[kBefore] = load_vector<1>(op.x + sequence * op.x_stride + channel)[0];
  const float s = taps.convolve(0, x[0], x[1], x[2], x[3]);
  store_vector(op.y + sequence * op.y_stride + channel, constant<1>(op.silu ? silu(s) : s));
#pragma unroll
  for (int i = 0; i < kBefore; ++i) {
    const int row = i - (kBefore - rows);
    if (row >= 0) state[row * op.d_inner] = x[i + 1];
  }
}

// d loss / d s from d loss / d y.
__device__ float through_silu(bool silu, float dy, float s) {
  if (!silu) return dy;
  const float sig = sigmoid(s);
  return dy * sig * fmaf(s, 1.0f - sig, 1.0f);
}

// A thread's walk back in time through one sequence's part of its run.
template <class T, int V>
struct BackwardWalk {
  const Conv<T>& op;
  const ConvGrad<T>& grad;
  const int64_t channel;
  const Taps<V> taps;
  Floats<V> x1, x2, x3;     // of tokens t - 2, t - 1, t
  Floats<V> ds1, ds2, ds3;  // of tokens t + 1, t + 2, t + 3
  Floats<V> dweight[kConvTaps], dbias;

  __device__ BackwardWalk(const Conv<T>& o, const ConvGrad<T>& g, int64_t c)
      : op(o), grad(g), channel(c), taps(o, c), dbias(constant<V>(0)) {
#pragma unroll
    for (int k = 0; k < kConvTaps; ++k) dweight[k] = constant<V>(0);
  }

  // ds of token t, whose oldest input is x0; kSums: the run's own token, its sums and dx are
  // wanted.
  template <bool kSums>
  __device__ Floats<V> token(const Floats<V>& x0, const Floats<V>& dy) {
    Floats<V> dx = constant<V>(0);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float s = taps.convolve(i, x0[i], x1[i], x2[i], x3[i]);
      const float ds = through_silu(op.silu, dy[i], s);
      if constexpr (kSums) {
        dweight[0][i] = fmaf(ds, x0[i], dweight[0][i]);
        dweight[1][i] = fmaf(ds, x1[i], dweight[1][i]);
        dweight[2][i] = fmaf(ds, x2[i], dweight[2][i]);
        dweight[3][i] = fmaf(ds, x3[i], dweight[3][i]);
        dbias[i] += ds;
        float sum = taps.weight[3][i] * ds;
        sum = fmaf(taps.weight[2][i], ds1[i], sum);
        sum = fmaf(taps.weight[1][i], ds2[i], sum);
        dx[i] = fmaf(taps.weight[0][i], ds3[i], sum);
      }
      ds3[i] = ds2[i], ds2[i] = ds1[i], ds1[i] = ds;
    }
    x3 = x2, x2 = x1, x1 = x0;
    return dx;
  }

  __device__ Floats<V> dy_at(int64_t t) const {
    return load_vector<V>(grad.dy + t * grad.dy_stride + channel);
  }
  __device__ void store_dx(int64_t t, const Floats<V>& dx) const {
    store_vector(grad.dx + t * grad.dx_stride + channel, dx);
  }

  // At a sequence's end the final state's gradient comes in; at its beginning inputs are the
  // state's.
  __device__ void edge_token(int sequence, int64_t begin, int64_t end, int64_t t) {
    Floats<V> dx = token<true>(input_at<V>(op, sequence, begin, t - kBefore, channel), dy_at(t));
    const int row = static_cast<int>(t - end) + op.d_conv - 1;
    if (grad.dstate && row >= 0) {
      const Floats<V> from_state =
          load_vector<V>(grad.dstate + op.state_row(sequence, row) + channel);
#pragma unroll
      for (int i = 0; i < V; ++i) dx[i] += from_state[i];
    }
    store_dx(t, dx);
  }

  // Tokens [first, last) of the sequence [begin, end).
  __device__ void sequence(int sequence, int64_t begin, int64_t end, int64_t first, int64_t last) {
    int64_t t = min(last + kBefore, end) - 1;
    x3 = input_at<V>(op, sequence, begin, t, channel);
    x2 = input_at<V>(op, sequence, begin, t - 1, channel);
    x1 = input_at<V>(op, sequence, begin, t - 2, channel);
    ds1 = ds2 = ds3 = constant<V>(0);
    for (; t >= last; --t)
      token<false>(input_at<V>(op, sequence, begin, t - kBefore, channel), dy_at(t));
    for (; t >= first && t >= end - kBefore; --t) edge_token(sequence, begin, end, t);
    const int64_t inside = max(first, begin + kBefore);  // oldest token with all inputs in x
    for (; t - kTogether + 1 >= inside; t -= kTogether) {
      Packed<T, V> x0[kTogether], dy[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        x0[u] = load_packed<V>(op.x + (t - u - kBefore) * op.x_stride + channel);
        dy[u] = load_packed<V>(grad.dy + (t - u) * grad.dy_stride + channel);
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u)
        store_dx(t - u, token<true>(unpack(x0[u]), unpack(dy[u])));
    }
    for (; t >= first; --t) edge_token(sequence, begin, end, t);
  }
};

// Grid: token_blocks x channel_blocks, a thread owns V channels of a run of tokens and walks it
// back in time, recomputing s; it begins three tokens behind its run for their ds. On chip: a
// thread's last inputs, ds and sums of dweight and dbias in registers, which the block adds up over
// its runs in order. Moves x, dy and dx once: 6 bytes an element in bf16.
template <class T, int V>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_bwd_runs(const Conv<T> op, const ConvGrad<T> grad, const int run) {
  __shared__ float sums[kConvThreads * V];
  const int64_t channel = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  const int64_t first = (int64_t{blockIdx.x} * blockDim.y + threadIdx.y) * run;
  const bool active = channel < op.d_inner && first < op.tokens;
  BackwardWalk<T, V> walk(op, grad, channel < op.d_inner ? channel : 0);
  if (active) {
    int64_t last = min(first + run, op.tokens);
    for (int s = sequence_of(op.seq_start, op.num_seqs, last - 1); last > first; --s) {
      const int64_t begin = op.seq_start[s], end = op.seq_start[s + 1];
      if (begin >= last) continue;  // an empty sequence
      walk.sequence(s, begin, end, max(first, begin), last);
      last = begin;
    }
  }
  const int width = blockDim.x * V;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t first_channel = int64_t{blockIdx.y} * width;
#pragma unroll
  for (int q = 0; q < kConvQuantities; ++q) {
    const Floats<V>& own = q < kConvTaps ? walk.dweight[q % kConvTaps] : walk.dbias;
#pragma unroll
    for (int i = 0; i < V; ++i) sums[threadIdx.y * width + threadIdx.x * V + i] = own[i];
    __syncthreads();  // the block's sums of this quantity are there
    for (int c = thread; c < width && first_channel + c < op.d_inner; c += kConvThreads) {
      float sum = 0;
      for (int row = 0; row < blockDim.y; ++row) sum += sums[row * width + c];
      grad.partial[(int64_t{blockIdx.x} * kConvQuantities + q) * op.d_inner + first_channel + c] =
          sum;
    }
    __syncthreads();  // they have been read
  }
}

// Where the sums over tokens go: tap or bias of a channel.
struct AddGradients {
  float *dweight, *dbias;
  int64_t d_inner;
  int d_conv;

  __device__ void operator()(int64_t i, float sum) const {
    const int64_t channel = i % d_inner;
    const int tap = static_cast<int>(i / d_inner) - (kConvTaps - d_conv);
    if (tap == d_conv) {
      if (dbias) dbias[channel] += sum;
    } else if (tap >= 0) {
      dweight[channel * d_conv + tap] += sum;
    }
  }
};

// Grid: a thread owns a channel of a sequence: the gradient of its initial state, from the first
// tokens and, in a short sequence, from the final state's. After bwd_runs, whose blocks read that.
template <class T>
__global__ void causal_conv1d_bwd_state(const Conv<T> op, const ConvGrad<T> grad) {
  const int64_t id = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (id >= op.num_seqs * op.d_inner) return;
  const int sequence = static_cast<int>(id / op.d_inner);
  const int64_t channel = id % op.d_inner;
  const int64_t begin = op.seq_start[sequence], end = op.seq_start[sequence + 1];
  const int rows = op.d_conv - 1;
  const Taps<1> taps(op, channel);
  float* dstate = grad.dstate + op.state_row(sequence, 0) + channel;
  float x[2 * kBefore], ds[kBefore], out[kBefore];
#pragma unroll
  for (int i = 0; i < 2 * kBefore; ++i)
    x[i] = begin + i - kBefore < end
               ? input_at<1>(op, sequence, begin, begin + i - kBefore, channel)[0]
               : 0.0f;
#pragma unroll
  for (int t = 0; t < kBefore; ++t) {
    ds[t] = 0;
    if (begin + t >= end) continue;
    const float s = taps.convolve(0, x[t], x[t + 1], x[t + 2], x[t + 3]);
    const float dy = load_vector<1>(grad.dy + (begin + t) * grad.dy_stride + channel)[0];
    ds[t] = through_silu(op.silu, dy, s);
  }
  // Place i of the window stands kBefore - i tokens before the sequence; with fewer rows the first
  // places are none of the state's.
#pragma unroll
  for (int i = 0; i < kBefore; ++i) {
    const int64_t row = i - (kBefore - rows) - (end - begin);  // of the final state
    out[i] = i >= kBefore - rows && row >= 0 ? dstate[row * op.d_inner] : 0.0f;
#pragma unroll
    for (int t = 0; t <= i; ++t) out[i] = fmaf(taps.weight[i - t][0], ds[t], out[i]);
  }
#pragma unroll
  for (int i = 0; i < kBefore; ++i) {
    const int row = i - (kBefore - rows);
    if (row >= 0) dstate[row * op.d_inner] = out[i];
  }
}

template <class T>
Conv<T> arguments(const CausalConv1d& op) {
  const auto f32 = [](const Tensor& t) { return t ? t.ptr<float>() : nullptr; };
  const auto i32 = [](const Tensor& t) { return t ? t.ptr<int32_t>() : nullptr; };
  return {.x = op.x.ptr<T>(),
          .weight = f32(op.weight),
          .bias = f32(op.bias),
          .seq_start = i32(op.seq_start),
          .slot = i32(op.slot),
          .state = f32(op.state),
          .y = op.y ? op.y.ptr<T>() : nullptr,
          .x_stride = op.x.stride[0],
          .y_stride = op.y ? op.y.stride[0] : 0,
          .tokens = op.x.shape[0],
          .d_inner = op.x.shape[1],
          .num_seqs = op.seq_start ? static_cast<int>(op.seq_start.shape[0] - 1) : 0,
          .d_conv = static_cast<int>(op.weight.shape[1]),
          .silu = op.silu};
}

// f(T{}, V) for the element type and whether all tensors' rows allow vectors.
template <int VF32, int VBf16, class F>
void dispatch(DType dtype, std::initializer_list<const Tensor*> tensors, F&& f) {
  dispatch_f32_bf16(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = sizeof(T) == 4 ? VF32 : VBf16;
    const bool vectors = std::ranges::all_of(tensors, [](auto t) { return vector_rows(*t, V); });
    vectors ? f(tag, std::integral_constant<int, V>{}) : f(tag, std::integral_constant<int, 1>{});
  });
}

unsigned flat_blocks(int64_t count) {
  return static_cast<unsigned>((count + kConvThreads - 1) / kConvThreads);
}

constexpr int kFwdRun = 32, kBwdRun = 64;

}  // namespace

void causal_conv1d_fwd(Context& ctx, const CausalConv1d& op) {
  const State& gpu = state_of(ctx);
  dispatch<4, 8>(op.x.dtype, {&op.x, &op.y, &op.state}, [&](auto tag, auto vector) {
    using T = typename decltype(tag)::type;
    const Conv<T> args = arguments<T>(op);
    const CausalConv1dPlan plan =
        plan_causal_conv1d(args.tokens, args.d_inner, vector, kFwdRun, gpu.multiprocessors);
    const dim3 grid(static_cast<unsigned>(plan.token_blocks),
                    static_cast<unsigned>(plan.channel_blocks));
    const dim3 block(static_cast<unsigned>(plan.columns), static_cast<unsigned>(plan.rows));
    causal_conv1d_fwd_runs<T, vector><<<grid, block, 0, gpu.stream>>>(args, plan.run);
    check_launch("causal_conv1d_fwd_runs");
    if (!args.state) return;
    causal_conv1d_final_state<T>
        <<<flat_blocks(args.num_seqs * args.d_inner), kConvThreads, 0, gpu.stream>>>(args);
    check_launch("causal_conv1d_final_state");
  });
}

void causal_conv1d_bwd(Context& ctx, const CausalConv1d& op, const CausalConv1dGrad& grad) {
  const State& gpu = state_of(ctx);
  const Arena::Scope scope(ctx.workspace());
  dispatch<4, 4>(
      op.x.dtype, {&op.x, &grad.dy, &grad.dx, &op.state, &grad.dstate}, [&](auto tag, auto vector) {
        using T = typename decltype(tag)::type;
        const Conv<T> args = arguments<T>(op);
        const CausalConv1dPlan plan =
            plan_causal_conv1d(args.tokens, args.d_inner, vector, kBwdRun, gpu.multiprocessors);
        const int64_t sums = kConvQuantities * args.d_inner;
        const ConvGrad<T> grad_args = {
            .dy = grad.dy.ptr<T>(),
            .dx = grad.dx.ptr<T>(),
            .dstate = grad.dstate ? grad.dstate.ptr<float>() : nullptr,
            .partial = ctx.workspace().array<float>(plan.token_blocks * sums),
            .dy_stride = grad.dy.stride[0],
            .dx_stride = grad.dx.stride[0]};
        const dim3 grid(static_cast<unsigned>(plan.token_blocks),
                        static_cast<unsigned>(plan.channel_blocks));
        const dim3 block(static_cast<unsigned>(plan.columns), static_cast<unsigned>(plan.rows));
        causal_conv1d_bwd_runs<T, vector>
            <<<grid, block, 0, gpu.stream>>>(args, grad_args, plan.run);
        check_launch("causal_conv1d_bwd_runs");
        launch_add_partial_sums(
            gpu.stream, grad_args.partial, plan.token_blocks, sums,
            AddGradients{.dweight = grad.dweight.ptr<float>(),
                         .dbias = grad.dbias ? grad.dbias.ptr<float>() : nullptr,
                         .d_inner = args.d_inner,
                         .d_conv = args.d_conv});
        if (!grad_args.dstate) return;
        causal_conv1d_bwd_state<T>
            <<<flat_blocks(args.num_seqs * args.d_inner), kConvThreads, 0, gpu.stream>>>(args,
                                                                                         grad_args);
        check_launch("causal_conv1d_bwd_state");
      });
}

void causal_conv1d_step(Context& ctx, const CausalConv1d& op) {
  const State& gpu = state_of(ctx);
  dispatch_f32_bf16(op.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Conv<T> args = arguments<T>(op);
    causal_conv1d_step_channels<T>
        <<<flat_blocks(args.tokens * args.d_inner), kConvThreads, 0, gpu.stream>>>(args);
    check_launch("causal_conv1d_step_channels");
  });
}

}  // namespace krait::cuda
