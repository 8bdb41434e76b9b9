// The causal convolution on a GPU. Token-major: the lanes of a warp lie along channels, a thread
// walks tokens with the last inputs in registers, so that every input is read once from memory (the
// few tokens at a run's edge are read again, from L2).
#include "ops/causal_conv1d_plan.h"
#include "ops/causal_conv1d_taps.cuh"
#include "ops/cuda/arguments.h"
#include "ops/cuda/dependent_launch.cuh"
#include "ops/cuda/f32_states.h"
#include "ops/cuda/math.cuh"
#include "ops/cuda/partial_sums.cuh"
#include "ops/cuda/sequences.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"

namespace krait::cuda {
namespace {

constexpr int kBefore = kConvTaps - 1;  // inputs before the current one

// Channels of a thread, tokens whose loads are on their way together, blocks that a multiprocessor
// holds at once (by their registers).
struct Tuning {
  int vector, together, blocks;
};
template <class T>
constexpr Tuning kFwd = {.vector = 4, .together = 8, .blocks = 3};
template <>
constexpr Tuning kFwd<float> = {.vector = 4, .together = 2, .blocks = 3};
template <class T>
constexpr Tuning kBwd = {.vector = 4, .together = 4, .blocks = 2};
template <>
constexpr Tuning kBwd<float> = {.vector = 4, .together = 2, .blocks = 2};

// y = s gate(s): silu, or 1 by other constants: no branch for each token.
struct Gate {
  float factor, slope;  // 1 / (1 + factor exp2(slope s))

  explicit Gate(bool silu) : factor(silu ? 1.0f : 0.0f), slope(silu ? -kLog2E : 0.0f) {}
  __device__ float operator()(float s) const {
    return reciprocal_approx(fmaf(factor, exp2_approx(slope * s), 1.0f));
  }
  // d loss / d s from d loss / d y.
  __device__ float backward(float dy, float s) const {
    const float g = (*this)(s);
    return dy * g * fmaf(s, 1.0f - g, 1.0f);
  }
};

// Steps from row to row in bytes: adding one to an address takes two instructions, a stride in
// elements four.
template <class T>
__device__ const T* step_rows(const T* row, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(row) + bytes);
}
template <class T>
__device__ T* step_rows(T* row, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(row) + bytes);
}

// S: type of the states.
template <class T, class S = float>
struct Conv {
  const T* x;
  const float *weight, *bias;
  const int32_t *seq_start, *slot;
  S* state;
  T* y;
  int64_t x_stride, y_stride;  // elements
  int64_t x_step, y_step;      // bytes
  int64_t tokens, d_inner;
  int num_seqs, d_conv;
  Gate gate;

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
  float* partial;                    // (token_blocks, kConvQuantities, d_inner)
  int64_t dy_stride, dx_stride;      // elements
  int64_t x_step, dy_step, dx_step;  // bytes, back in time
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
// thread's last inputs, and its next kTogether inputs on their way while it computes. Moves x and y
// once: 4 bytes an element in bf16, for which it issues 18 instructions. H200, 32 sequences x 1536
// x 2048: bf16 0.116 ms (82 % of 4.25 TB/s), f32 0.216 ms (88 %); 8 x 1024 x 131072: 87 %.
template <class T, int V>
__global__ void __launch_bounds__(kConvThreads, kFwd<T>.blocks)
    causal_conv1d_fwd_runs(const Conv<T> op, const int run) {
  constexpr int kTogether = kFwd<T>.together;
  wait_for_earlier_work();
  let_next_start();
  const int64_t channel = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  const int64_t first = (int64_t{blockIdx.x} * blockDim.y + threadIdx.y) * run;
  if (channel >= op.d_inner || first >= op.tokens) return;
  const int count = static_cast<int>(min(int64_t{run}, op.tokens - first));
  const T* const x = op.x + first * op.x_stride + channel;
  T* const y = op.y + first * op.y_stride + channel;
  // Tokens on their way, whatever their sequences: from [i, i + kTogether), where all of these are
  // the batch's (the last ones of a run may be the next one's, which nobody looks at).
  Packed<T, V> next[kTogether];
  const auto may_fetch = [&](int i) { return i < count && first + i + kTogether <= op.tokens; };
  const auto fetch = [&](int i) {
    if (!may_fetch(i)) return;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) next[u] = load_packed<V>(x + (i + u) * op.x_stride);
  };
  fetch(0);
  const Taps<V> taps(op, channel);
  int sequence = sequence_near(op.seq_start, op.num_seqs, first, op.tokens);
  int end;               // of the sequence, counted from the run's first token
  Floats<V> x0, x1, x2;  // oldest first
  const auto enter_sequence = [&](int i) {
    const int64_t begin = op.seq_start[sequence], t = first + i;
    end = static_cast<int>(op.seq_start[sequence + 1] - first);
    x0 = input_at<V>(op, sequence, begin, t - 3, channel);
    x1 = input_at<V>(op, sequence, begin, t - 2, channel);
    x2 = input_at<V>(op, sequence, begin, t - 1, channel);
  };
  enter_sequence(0);
  const auto step = [&](T* to, const Floats<V>& x3) {
    Floats<V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float s = taps.convolve(k, x0[k], x1[k], x2[k], x3[k]);
      out[k] = s * op.gate(s);
    }
    store_vector(to, out);
    x0 = x1, x1 = x2, x2 = x3;
  };
  for (int i = 0; i < count; i += kTogether) {
    if (i + kTogether <= min(end, count)) {
      const bool more = may_fetch(i + kTogether);
      const T* from = x + (i + kTogether) * op.x_stride;
      T* to = y + i * op.y_stride;
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const Floats<V> in = unpack(next[u]);
        if (more) next[u] = load_packed<V>(from);
        step(to, in);
        from = step_rows(from, op.x_step), to = step_rows(to, op.y_step);
      }
      continue;
    }
    fetch(i + kTogether);
    for (int j = i; j < min(i + kTogether, count); ++j) {
      if (j >= end) {
        do {
          ++sequence;
        } while (op.seq_start[sequence + 1] - first <= j);
        enter_sequence(j);
      }
      step(y + j * op.y_stride, load_vector<V>(x + j * op.x_stride));
    }
  }
}

// Grid: a thread owns a channel of a sequence. After fwd_runs, whose blocks read the initial
// states.
template <class T>
__global__ void causal_conv1d_final_state(const Conv<T> op) {
  wait_for_earlier_work();
  let_next_start();
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

// Grid: x over groups of V channels, y over groups of kSequences sequences, a thread owns one of
// each and moves the windows on by one token, all loads on their way together. Moves (d_conv - 1) x
// 2 x 4 bytes of state (bf16: 2 x 2) and x and y for each channel of a sequence.
template <class T, class S, int V, int kSequences>
__global__ void __launch_bounds__(kConvStepThreads)
    causal_conv1d_step_channels(const Conv<T, S> op, const bool settled, const bool vector_taps) {
  if (!settled) wait_for_earlier_work();
  const int64_t channel = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
  const bool there = channel < op.d_inner;
  const Taps<V> taps = vector_taps ? Taps<V>(op.weight, op.bias, there ? channel : 0)
                                   : Taps<V>(op, there ? channel : 0);
  const int rows = op.d_conv - 1, first = static_cast<int>(blockIdx.y) * kSequences;
  const int count = there ? min(kSequences, static_cast<int>(op.tokens) - first) : 0;
  S* state[kSequences];
  Floats<V> x[kSequences][kConvTaps];
#pragma unroll
  for (int k = 0; k < kSequences; ++k) {
    if (k >= count) continue;
    state[k] = op.state + op.state_row(first + k, 0) + channel;
#pragma unroll
    for (int i = 0; i < kBefore; ++i) {
      const int row = i - (kBefore - rows);
      x[k][i] = row >= 0 ? load_vector<V>(state[k] + row * op.d_inner) : constant<V>(0);
    }
  }
  if (settled) wait_for_earlier_work();
  let_next_start();
#pragma unroll
  for (int k = 0; k < kSequences; ++k)
    if (k < count) x[k][kBefore] = load_vector<V>(op.x + (first + k) * op.x_stride + channel);
#pragma unroll
  for (int k = 0; k < kSequences; ++k) {
    if (k >= count) continue;
    Floats<V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float s = taps.convolve(i, x[k][0][i], x[k][1][i], x[k][2][i], x[k][3][i]);
      y[i] = s * op.gate(s);
    }
    store_vector(op.y + (first + k) * op.y_stride + channel, y);
#pragma unroll
    for (int i = 0; i < kBefore; ++i) {
      const int row = i - (kBefore - rows);
      if (row >= 0) store_vector(state[k] + row * op.d_inner, x[k][i + 1]);
    }
  }
}

// A thread's walk back in time through its run. Tokens are counted from the run's first one.
template <class T, int V>
struct BackwardWalk {
  static constexpr int kTogether = kBwd<T>.together;
  const Conv<T>& op;
  const ConvGrad<T>& grad;
  const int64_t channel, first;
  const int count;
  const Taps<V> taps;
  Floats<V> x1, x2, x3;     // of tokens t - 2, t - 1, t
  Floats<V> ds1, ds2, ds3;  // of tokens t + 1, t + 2, t + 3
  Floats<V> dweight[kConvTaps], dbias;
  Packed<T, V> next_x0[kTogether], next_dy[kTogether];  // on their way
  int sequence, begin, end;                             // where token t belongs

  __device__ BackwardWalk(const Conv<T>& o, const ConvGrad<T>& g, int64_t c, int64_t f, int n)
      : op(o), grad(g), channel(c), first(f), count(n), taps(o, c), dbias(constant<V>(0)) {
#pragma unroll
    for (int k = 0; k < kConvTaps; ++k) dweight[k] = constant<V>(0);
  }

  __device__ Packed<T, V> x_at(int t) const {
    return load_packed<V>(op.x + (first + t) * op.x_stride + channel);
  }
  __device__ Packed<T, V> dy_at(int t) const {
    return load_packed<V>(grad.dy + (first + t) * grad.dy_stride + channel);
  }
  __device__ Floats<V> window_at(int t) const {  // of the sequence, or its state
    return input_at<V>(op, sequence, first + begin, first + t, channel);
  }
  __device__ void store_dx(int t, const Floats<V>& dx) const {
    store_vector(grad.dx + (first + t) * grad.dx_stride + channel, dx);
  }

  // Tokens on their way, whatever their sequences: t, t - 1, .. (kTogether of them), where all
  // their inputs are the batch's (the last ones of a run may be another run's, which nobody looks
  // at).
  __device__ bool may_fetch(int t) const { return t >= 0 && first + t >= kBefore + kTogether - 1; }
  __device__ void fetch(int t) {
    if (!may_fetch(t)) return;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      next_x0[u] = x_at(t - u - kBefore);
      next_dy[u] = dy_at(t - u);
    }
  }

  // ds of token t, whose oldest input is x0; kSums: the run's own token, its sums and dx are
  // wanted.
  template <bool kSums>
  __device__ Floats<V> token(const Floats<V>& x0, const Floats<V>& dy) {
    Floats<V> dx = constant<V>(0);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float s = taps.convolve(i, x0[i], x1[i], x2[i], x3[i]);
      const float ds = op.gate.backward(dy[i], s);
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

  // Enters the sequence that ends behind token t, or goes on past it: then the tokens behind t give
  // their ds.
  __device__ void enter_sequence(int t) {
    begin = static_cast<int>(op.seq_start[sequence] - first);
    end = static_cast<int>(op.seq_start[sequence + 1] - first);
    ds1 = ds2 = ds3 = constant<V>(0);
    if (t + kBefore < end && t - kBefore >= begin) {  // all loads at once
      Packed<T, V> x[2 * kBefore], dy[kBefore];
#pragma unroll
      for (int u = 0; u < 2 * kBefore; ++u) x[u] = x_at(t + kBefore - u);
#pragma unroll
      for (int u = 0; u < kBefore; ++u) dy[u] = dy_at(t + kBefore - u);
      x3 = unpack(x[0]), x2 = unpack(x[1]), x1 = unpack(x[2]);
#pragma unroll
      for (int u = 0; u < kBefore; ++u) token<false>(unpack(x[kBefore + u]), unpack(dy[u]));
      return;
    }
    int at = min(t + kBefore, end - 1);
    x3 = window_at(at), x2 = window_at(at - 1), x1 = window_at(at - 2);
    for (; at > t; --at) token<false>(window_at(at - kBefore), unpack(dy_at(at)));
  }

  // Any token: at a sequence's end the final state's gradient comes in, at its beginning inputs are
  // the state's.
  __device__ void edge_token(int t) {
    if (t < begin) {
      do {
        --sequence;
      } while (op.seq_start[sequence] - first > t);
      enter_sequence(t);
    }
    Floats<V> dx = token<true>(window_at(t - kBefore), unpack(dy_at(t)));
    const int row = t - end + op.d_conv - 1;
    if (grad.dstate && row >= 0) {
      const Floats<V> from_state =
          load_vector<V>(grad.dstate + op.state_row(sequence, row) + channel);
#pragma unroll
      for (int i = 0; i < V; ++i) dx[i] += from_state[i];
    }
    store_dx(t, dx);
  }

  // Tokens t, t - 1, .. (kTogether of them) inside a sequence, as fetched.
  __device__ void inner_tokens(int t) {
    const bool more = may_fetch(t - kTogether);
    const T* x = op.x + (first + t - kTogether - kBefore) * op.x_stride + channel;
    const T* dy = grad.dy + (first + t - kTogether) * grad.dy_stride + channel;
    T* dx = grad.dx + (first + t) * grad.dx_stride + channel;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const Floats<V> x0 = unpack(next_x0[u]), dy0 = unpack(next_dy[u]);
      if (more) next_x0[u] = load_packed<V>(x), next_dy[u] = load_packed<V>(dy);
      store_vector(dx, token<true>(x0, dy0));
      x = step_rows(x, grad.x_step), dy = step_rows(dy, grad.dy_step);
      dx = step_rows(dx, grad.dx_step);
    }
  }

  __device__ void run() {
    fetch(count - 1);
    sequence = sequence_near(op.seq_start, op.num_seqs, first + count - 1, op.tokens);
    enter_sequence(count - 1);
    for (int t = count - 1; t >= 0; t -= kTogether) {
      if (t - kTogether + 1 >= max(begin + kBefore, 0) && t < end - kBefore) {
        inner_tokens(t);
      } else {
        fetch(t - kTogether);
        for (int at = t; at > t - kTogether && at >= 0; --at) edge_token(at);
      }
    }
  }
};

// Grid: token_blocks x channel_blocks, a thread owns V channels of a run of tokens and walks it
// back in time, recomputing s; it begins three tokens behind its run for their ds. On chip: a
// thread's last inputs, ds and sums of dweight and dbias in registers, which the block adds up over
// its runs in order (20 KiB), and the inputs of the next kTogether tokens on their way. Moves x, dy
// and dx once: 6 bytes an element in bf16, for which it issues 30 instructions. H200, 32 sequences
// x 1536 x 2048: bf16 0.186 ms (76 % of 4.25 TB/s), f32 0.325 ms (88 %); 8 x 1024 x 131072: 86 %.
template <class T, int V>
__global__ void __launch_bounds__(kConvThreads, kBwd<T>.blocks)
    causal_conv1d_bwd_runs(const Conv<T> op, const ConvGrad<T> grad, const int run) {
  __shared__ __align__(16) float sums[kConvQuantities * kConvThreads * V];
  const int64_t channel = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  const int64_t first = (int64_t{blockIdx.x} * blockDim.y + threadIdx.y) * run;
  const bool active = channel < op.d_inner && first < op.tokens;
  BackwardWalk<T, V> walk(op, grad, active ? channel : 0, active ? first : 0,
                          static_cast<int>(min(int64_t{run}, op.tokens - first)));
  if (active) walk.run();
  // sums: (kConvQuantities, rows, width)
  const int width = blockDim.x * V, rows = blockDim.y;
#pragma unroll
  for (int q = 0; q < kConvQuantities; ++q)
    store_vector(sums + (q * rows + threadIdx.y) * width + threadIdx.x * V,
                 q < kConvTaps ? walk.dweight[q % kConvTaps] : walk.dbias);
  __syncthreads();  // the sums of all runs are there
  const int64_t first_channel = int64_t{blockIdx.y} * width;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < kConvQuantities * width;
       i += kConvThreads) {
    const int q = i / width, c = i % width;
    if (first_channel + c >= op.d_inner) continue;
    float sum = 0;
#pragma unroll 8
    for (int row = 0; row < rows; ++row) sum += sums[(q * rows + row) * width + c];
    grad.partial[(int64_t{blockIdx.x} * kConvQuantities + q) * op.d_inner + first_channel + c] =
        sum;
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
    ds[t] = op.gate.backward(dy, s);
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

template <class T, class S = float>
Conv<T, S> arguments(const CausalConv1d& op) {
  return {.x = op.x.ptr<T>(),
          .weight = f32(op.weight),
          .bias = f32(op.bias),
          .seq_start = i32(op.seq_start),
          .slot = i32(op.slot),
          .state = op.state ? op.state.ptr<S>() : nullptr,
          .y = op.y ? op.y.ptr<T>() : nullptr,
          .x_stride = op.x.stride[0],
          .y_stride = op.y ? op.y.stride[0] : 0,
          .x_step = op.x.stride[0] * static_cast<int64_t>(sizeof(T)),
          .y_step = op.y ? op.y.stride[0] * static_cast<int64_t>(sizeof(T)) : 0,
          .tokens = op.x.shape[0],
          .d_inner = op.x.shape[1],
          .num_seqs = op.seq_start ? static_cast<int>(op.seq_start.shape[0] - 1) : 0,
          .d_conv = static_cast<int>(op.weight.shape[1]),
          .gate = Gate(op.silu)};
}

// f(T{}, V): as many channels to a thread as the tuning says where all tensors' rows allow it, else
// one.
template <int kVectorF32, int kVectorBf16, class F>
void dispatch(DType dtype, std::initializer_list<const Tensor*> tensors, const F& f) {
  dispatch_f32_bf16(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = sizeof(T) == 4 ? kVectorF32 : kVectorBf16;
    const bool vectors = std::ranges::all_of(tensors, [](auto t) { return vector_rows(*t, V); });
    vectors ? f(tag, std::integral_constant<int, V>{}) : f(tag, std::integral_constant<int, 1>{});
  });
}

unsigned flat_blocks(int64_t count) {
  return static_cast<unsigned>((count + kConvThreads - 1) / kConvThreads);
}

}  // namespace

void causal_conv1d_fwd(Context& ctx, const CausalConv1d& op) {
  if (op.state.dtype == DType::bf16) return with_f32_states(ctx, op, causal_conv1d_fwd);
  const State& gpu = state_of(ctx);
  dispatch<kFwd<float>.vector, kFwd<bf16>.vector>(
      op.x.dtype, {&op.x, &op.y, &op.state}, [&](auto tag, auto vector) {
        using T = typename decltype(tag)::type;
        const Conv<T> args = arguments<T>(op);
        const CausalConv1dPlan plan = plan_causal_conv1d(args.tokens, args.d_inner, vector,
                                                         kFwd<T>.blocks, gpu.multiprocessors);
        const dim3 grid(static_cast<unsigned>(plan.token_blocks),
                        static_cast<unsigned>(plan.channel_blocks));
        const dim3 block(static_cast<unsigned>(plan.columns), static_cast<unsigned>(plan.rows));
        launch_dependent(gpu, "causal_conv1d_fwd_runs", causal_conv1d_fwd_runs<T, vector>,
                         {.grid = grid, .block = block}, args, plan.run);
        if (!args.state) return;
        launch_dependent(gpu, "causal_conv1d_final_state", causal_conv1d_final_state<T>,
                         {.grid = flat_blocks(args.num_seqs * args.d_inner), .block = kConvThreads},
                         args);
      });
}

void causal_conv1d_bwd(Context& ctx, const CausalConv1d& op, const CausalConv1dGrad& grad) {
  const State& gpu = state_of(ctx);
  const Arena::Scope scope(ctx.workspace());
  dispatch<kBwd<float>.vector, kBwd<bf16>.vector>(
      op.x.dtype, {&op.x, &grad.dy, &grad.dx, &op.state, &grad.dstate}, [&](auto tag, auto vector) {
        using T = typename decltype(tag)::type;
        const Conv<T> args = arguments<T>(op);
        const CausalConv1dPlan plan = plan_causal_conv1d(args.tokens, args.d_inner, vector,
                                                         kBwd<T>.blocks, gpu.multiprocessors);
        const int64_t sums = kConvQuantities * args.d_inner;
        const ConvGrad<T> grad_args = {
            .dy = grad.dy.ptr<T>(),
            .dx = grad.dx.ptr<T>(),
            .dstate = f32(grad.dstate),
            .partial = ctx.workspace().array<float>(plan.token_blocks * sums),
            .dy_stride = grad.dy.stride[0],
            .dx_stride = grad.dx.stride[0],
            .x_step = -args.x_step,
            .dy_step = -grad.dy.stride[0] * static_cast<int64_t>(sizeof(T)),
            .dx_step = -grad.dx.stride[0] * static_cast<int64_t>(sizeof(T))};
        const dim3 grid(static_cast<unsigned>(plan.token_blocks),
                        static_cast<unsigned>(plan.channel_blocks));
        const dim3 block(static_cast<unsigned>(plan.columns), static_cast<unsigned>(plan.rows));
        causal_conv1d_bwd_runs<T, vector>
            <<<grid, block, 0, gpu.stream>>>(args, grad_args, plan.run);
        check_launch("causal_conv1d_bwd_runs");
        launch_add_partial_sums(gpu.stream, grad_args.partial, plan.token_blocks, sums,
                                AddGradients{.dweight = grad.dweight.ptr<float>(),
                                             .dbias = f32(grad.dbias),
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
  State& gpu = state_of(ctx);
  const bool vector_taps = op.weight.shape[1] == 4 && aligned(op.weight) && aligned(op.bias);
  dispatch<kConvStepVector, kConvStepVector>(
      op.x.dtype, {&op.x, &op.y, &op.state}, [&](auto tag, auto vector) {
        using T = typename decltype(tag)::type;
        const CausalConv1dStepPlan plan =
            plan_causal_conv1d_step(op.x.shape[0], op.x.shape[1], vector, gpu.multiprocessors);
        const LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.channel_blocks),
                                                static_cast<unsigned>(plan.sequence_blocks)),
                                   .block = kConvStepThreads};
        dispatch_f32_bf16(op.state.dtype, [&](auto state_tag) {
          using S = typename decltype(state_tag)::type;
          launch_dependent(gpu, "causal_conv1d_step_channels",
                           plan.sequences == 1
                               ? causal_conv1d_step_channels<T, S, vector, 1>
                               : causal_conv1d_step_channels<T, S, vector, kConvStepSequences>,
                           shape, arguments<T, S>(op), op.settled, vector_taps);
        });
      });
}

}  // namespace krait::cuda
