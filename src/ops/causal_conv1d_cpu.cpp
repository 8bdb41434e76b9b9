// Causal convolution on the CPU. Vector lanes are channels; rows are read as they lie. A piece is a
// range of up to kPieceTokens tokens of one sequence, all channels: neighbouring rows stay in the
// first cache. Cuts depend on the shape alone.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/causal_conv1d_cpu.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/causal_conv1d.h"
#include "ops/simd_math-inl.h"

#ifndef KRAIT_OPS_CAUSAL_CONV1D_CPU_ONCE_
#define KRAIT_OPS_CAUSAL_CONV1D_CPU_ONCE_
namespace krait::cpu {

inline constexpr int64_t kPieceTokens = 64;
inline constexpr int64_t kStrip = 256;  // channels of a row handled at a time

// Tokens [begin, end) of the sequence that starts at seq_begin and ends at seq_end; state: its
// slot's rows before, or null.
struct ConvPiece {
  int64_t begin, end, seq_begin, seq_end;
  const void* state;    // (d_conv - 1, d_inner)
  const float* weight;  // (d_conv, d_inner): transposed
  // Backward only:
  float* sums;  // (d_conv + 1, d_inner): gradients of weight, transposed, and bias; added to
  float*
      dstate;  // (d_conv - 1, d_inner): its slot's rows, the gradient of the final state; or null
};

}  // namespace krait::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

using cpu::ConvPiece;
using cpu::kStrip;

constexpr int64_t kMaxTaps = 4;

// The input `back` tokens before token t: from the sequence, from the state, or zero. S: the
// state's type.
template <class T, class S>
HWY_INLINE VF load_input(const CausalConv1d& op, const ConvPiece& p, int64_t t, int64_t back,
                         int64_t c, size_t valid) {
  const DF d;
  if (t - back >= p.seq_begin) return load_part(d, op.x.row<T>(t - back) + c, valid);
  if (!p.state) return hn::Zero(d);
  const int64_t row = (t - p.seq_begin) - back + op.weight.shape[1] - 1;
  return load_part(d, static_cast<const S*>(p.state) + row * op.x.shape[1] + c, valid);
}

// bias + sum_k weight[k] x_{t - (d_conv - 1) + k}
template <class T, class S>
HWY_INLINE VF convolve(const CausalConv1d& op, const ConvPiece& p, int64_t t, int64_t c,
                       size_t valid) {
  const DF d;
  const int64_t d_inner = op.x.shape[1], last = op.weight.shape[1] - 1;
  VF sum = op.bias ? load_part(d, op.bias.ptr<float>() + c, valid) : hn::Zero(d);
  for (int64_t k = 0; k <= last; ++k)
    sum = hn::MulAdd(load_part(d, p.weight + k * d_inner + c, valid),
                     load_input<T, S>(op, p, t, last - k, c, valid), sum);
  return sum;
}

template <class T, class S>
void forward_piece(const CausalConv1d& op, const ConvPiece& p) {
  const DF d;
  for (int64_t strip = 0; strip < op.x.shape[1]; strip += kStrip) {
    const size_t channels = static_cast<size_t>(std::min(kStrip, op.x.shape[1] - strip));
    for (int64_t t = p.begin; t < p.end; ++t)
      for_each_vector(channels, [&](size_t i, size_t valid) {
        const int64_t c = strip + static_cast<int64_t>(i);
        const VF s = convolve<T, S>(op, p, t, c, valid);
        store_part(d, op.silu ? silu(d, s) : s, op.y.row<T>(t) + c, valid);
      });
  }
}

// Gradient of the sum before SiLU, d objective / d s_t.
template <class T>
HWY_INLINE VF sum_gradient(const CausalConv1d& op, const CausalConv1dGrad& grad, const ConvPiece& p,
                           int64_t t, int64_t c, size_t valid) {
  const DF d;
  const VF dy = load_part(d, grad.dy.row<T>(t) + c, valid);
  if (!op.silu) return dy;
  const VF s = convolve<T, float>(op, p, t, c, valid), sig = sigmoid(d, s), one = hn::Set(d, 1.0f);
  return hn::Mul(dy, hn::Mul(sig, hn::MulAdd(s, hn::Sub(one, sig), one)));
}

// dx_t = sum_j weight[d_conv - 1 - j] ds_{t + j}: a window of gradients slides over the tokens, one
// vector of channels at a time.
template <class T>
void backward_vector(const CausalConv1d& op, const CausalConv1dGrad& grad, const ConvPiece& p,
                     int64_t c, size_t valid) {
  const DF d;
  const int64_t d_inner = op.x.shape[1], taps = op.weight.shape[1];
  VF weight[kMaxTaps], dweight[kMaxTaps], ds[kMaxTaps];
  for (int64_t k = 0; k < taps; ++k) {
    weight[k] = load_part(d, p.weight + k * d_inner + c, valid);
    dweight[k] = load_part(d, p.sums + k * d_inner + c, valid);
  }
  VF dbias = load_part(d, p.sums + taps * d_inner + c, valid);
  const auto gradient_at = [&](int64_t t) {
    return t < p.seq_end ? sum_gradient<T>(op, grad, p, t, c, valid) : hn::Zero(d);
  };
  for (int64_t j = 0; j < taps - 1; ++j) ds[j] = gradient_at(p.begin + j);
  for (int64_t t = p.begin; t < p.end; ++t) {
    ds[taps - 1] = gradient_at(t + taps - 1);
    VF dx = hn::Zero(d);
    for (int64_t j = 0; j < taps; ++j) dx = hn::MulAdd(weight[taps - 1 - j], ds[j], dx);
    const int64_t kept = t - (p.seq_end - (taps - 1));  // this input's row in the final state
    if (p.dstate && kept >= 0) dx = hn::Add(dx, load_part(d, p.dstate + kept * d_inner + c, valid));
    store_part(d, dx, grad.dx.row<T>(t) + c, valid);
    dbias = hn::Add(dbias, ds[0]);
    for (int64_t k = 0; k < taps; ++k)
      dweight[k] =
          hn::MulAdd(ds[0], load_input<T, float>(op, p, t, taps - 1 - k, c, valid), dweight[k]);
    for (int64_t j = 0; j + 1 < taps; ++j) ds[j] = ds[j + 1];
  }
  for (int64_t k = 0; k < taps; ++k) store_part(d, dweight[k], p.sums + k * d_inner + c, valid);
  store_part(d, dbias, p.sums + taps * d_inner + c, valid);
}

// The gradient of the initial state, in place of that of the final one. Row j of the initial state
// is tap j - i of token i; rows of a final state that a short sequence did not fill are rows of the
// initial one.
template <class T>
void initial_gradient(const CausalConv1d& op, const CausalConv1dGrad& grad, const ConvPiece& p,
                      int64_t c, size_t valid) {
  const DF d;
  const int64_t d_inner = op.x.shape[1], before = op.weight.shape[1] - 1,
                length = p.seq_end - p.seq_begin;
  VF ds[kMaxTaps], initial[kMaxTaps];
  for (int64_t i = 0; i < std::min(before, length); ++i)
    ds[i] = sum_gradient<T>(op, grad, p, p.seq_begin + i, c, valid);
  for (int64_t j = 0; j < before; ++j) {
    const int64_t final_row = j - length;
    initial[j] =
        final_row >= 0 ? load_part(d, p.dstate + final_row * d_inner + c, valid) : hn::Zero(d);
    for (int64_t i = 0; i <= j && i < length; ++i)
      initial[j] =
          hn::MulAdd(load_part(d, p.weight + (j - i) * d_inner + c, valid), ds[i], initial[j]);
  }
  for (int64_t j = 0; j < before; ++j) store_part(d, initial[j], p.dstate + j * d_inner + c, valid);
}

void conv_forward_piece(const CausalConv1d& op, const ConvPiece& p) {
  dispatch_f32_bf16(op.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (op.state.dtype == DType::f32) return forward_piece<T, float>(op, p);
    forward_piece<T, krait::bf16>(op, p);
  });
}

void conv_backward_piece(const CausalConv1d& op, const CausalConv1dGrad& grad, const ConvPiece& p) {
  for_each_vector(static_cast<size_t>(op.x.shape[1]), [&](size_t c, size_t valid) {
    if (op.x.dtype == DType::f32)
      return backward_vector<float>(op, grad, p, static_cast<int64_t>(c), valid);
    backward_vector<krait::bf16>(op, grad, p, static_cast<int64_t>(c), valid);
  });
}

void conv_initial_gradient(const CausalConv1d& op, const CausalConv1dGrad& grad,
                           const ConvPiece& p) {
  for_each_vector(static_cast<size_t>(op.x.shape[1]), [&](size_t c, size_t valid) {
    if (op.x.dtype == DType::f32)
      return initial_gradient<float>(op, grad, p, static_cast<int64_t>(c), valid);
    initial_gradient<krait::bf16>(op, grad, p, static_cast<int64_t>(c), valid);
  });
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>
#include <cstring>

#include "core/threads.h"
#include "ops/engine.h"

namespace krait {
HWY_EXPORT(conv_forward_piece);
HWY_EXPORT(conv_backward_piece);
HWY_EXPORT(conv_initial_gradient);
}  // namespace krait

namespace krait::cpu {
namespace {

Tensor rows_of(const Tensor& state, const Tensor& slot, int64_t sequence) {
  if (!state) return state;
  const int64_t s = slot ? slot.ptr<int32_t>()[sequence] : sequence;
  return state.slice(0, s, s + 1);
}

float* f32_rows(const Tensor& state, const Tensor& slot, int64_t sequence) {
  return rows_of(state, slot, sequence).ptr<float>();
}

const float* transposed_weight(Context& ctx, const CausalConv1d& op) {
  const int64_t d_inner = op.x.shape[1], taps = op.weight.shape[1];
  float* out = ctx.workspace().array<float>(taps * d_inner);
  for (int64_t c = 0; c < d_inner; ++c)
    for (int64_t k = 0; k < taps; ++k) out[k * d_inner + c] = op.weight.row<float>(c)[k];
  return out;
}

ConvPiece piece_of(const CausalConv1d& op, const float* weight, int64_t s, int64_t begin) {
  const int32_t* start = op.seq_start.ptr<int32_t>();
  return {.begin = begin,
          .end = std::min<int64_t>(begin + kPieceTokens, start[s + 1]),
          .seq_begin = start[s],
          .seq_end = start[s + 1],
          .state = rows_of(op.state, op.slot, s).data,
          .weight = weight,
          .sums = nullptr,
          .dstate = nullptr};
}

struct ConvPieces {
  ConvPiece* piece;
  int64_t count;
};

// Every sequence cut into ranges of kPieceTokens tokens.
ConvPieces cut(Context& ctx, const CausalConv1d& op, const float* weight) {
  const int32_t* start = op.seq_start.ptr<int32_t>();
  const int64_t num_seqs = op.seq_start.shape[0] - 1;
  ConvPieces pieces = {ctx.workspace().array<ConvPiece>(num_seqs + op.x.shape[0] / kPieceTokens),
                       0};
  for (int64_t s = 0; s < num_seqs; ++s)
    for (int64_t t = start[s]; t < start[s + 1]; t += kPieceTokens)
      pieces.piece[pieces.count++] = piece_of(op, weight, s, t);
  return pieces;
}

// The last d_conv - 1 inputs of a sequence become its state.
template <class T, class S>
void keep_inputs(const CausalConv1d& op, int64_t s, int64_t begin, int64_t end) {
  const int64_t d_inner = op.x.shape[1], before = op.weight.shape[1] - 1, length = end - begin;
  S* state = rows_of(op.state, op.slot, s).ptr<S>();
  for (int64_t j = 0; j < before; ++j) {
    const int64_t from = length - before + j;  // counted from the sequence's start
    S* row = state + j * d_inner;
    if (from < 0) {
      std::memmove(row, state + (from + before) * d_inner,
                   static_cast<size_t>(d_inner) * sizeof(S));
      continue;
    }
    const T* x = op.x.row<T>(begin + from);
    for (int64_t c = 0; c < d_inner; ++c) row[c] = static_cast<S>(x[c]);
  }
}

void keep_inputs_of(const CausalConv1d& op, int64_t s, int64_t begin, int64_t end) {
  dispatch_f32_bf16(op.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (op.state.dtype == DType::f32) return keep_inputs<T, float>(op, s, begin, end);
    keep_inputs<T, bf16>(op, s, begin, end);
  });
}

}  // namespace

void causal_conv1d_fwd(Context& ctx, const CausalConv1d& op) {
  const Arena::Scope scope(ctx.workspace());
  const ConvPieces pieces = cut(ctx, op, transposed_weight(ctx, op));
  parallel_for(ctx.threads(), pieces.count, [&](int64_t i) {
    HWY_DYNAMIC_DISPATCH(conv_forward_piece)(op, pieces.piece[i]);
  });
  if (!op.state) return;
  const int32_t* start = op.seq_start.ptr<int32_t>();
  const int64_t num_seqs = op.seq_start.shape[0] - 1;
  parallel_for(num_seqs > 8 ? ctx.threads() : 1, num_seqs,
               [&](int64_t s) { keep_inputs_of(op, s, start[s], start[s + 1]); });
}

void causal_conv1d_step(Context& ctx, const CausalConv1d& op) {
  const Arena::Scope scope(ctx.workspace());
  const float* weight = transposed_weight(ctx, op);
  parallel_for(op.x.shape[0] > 8 ? ctx.threads() : 1, op.x.shape[0], [&](int64_t s) {
    const ConvPiece piece = {.begin = s,
                             .end = s + 1,
                             .seq_begin = s,
                             .seq_end = s + 1,
                             .state = rows_of(op.state, op.slot, s).data,
                             .weight = weight,
                             .sums = nullptr,
                             .dstate = nullptr};
    HWY_DYNAMIC_DISPATCH(conv_forward_piece)(op, piece);
    keep_inputs_of(op, s, s, s + 1);
  });
}

void causal_conv1d_bwd(Context& ctx, const CausalConv1d& op, const CausalConv1dGrad& grad) {
  const Arena::Scope scope(ctx.workspace());
  const int64_t d_inner = op.x.shape[1], taps = op.weight.shape[1],
                num_seqs = op.seq_start.shape[0] - 1;
  const float* weight = transposed_weight(ctx, op);
  const ConvPieces pieces = cut(ctx, op, weight);
  for (int64_t i = 0, s = 0; i < pieces.count; ++i) {
    while (op.seq_start.ptr<int32_t>()[s + 1] <= pieces.piece[i].begin) ++s;
    pieces.piece[i].dstate = f32_rows(grad.dstate, op.slot, s);
  }
  // Parameter gradients: one sum for each of a fixed number of groups of pieces, added in order.
  const int64_t groups = std::clamp<int64_t>(pieces.count, 1, 16), size = (taps + 1) * d_inner;
  float* sums = ctx.workspace().array<float>(groups * size);
  std::memset(sums, 0, static_cast<size_t>(groups * size) * sizeof(float));
  parallel_for(ctx.threads(), groups, [&](int64_t g) {
    for (int64_t i = pieces.count * g / groups; i < pieces.count * (g + 1) / groups; ++i) {
      pieces.piece[i].sums = sums + g * size;
      HWY_DYNAMIC_DISPATCH(conv_backward_piece)(op, grad, pieces.piece[i]);
    }
  });
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < d_inner; ++c) {
      for (int64_t k = 0; k < taps; ++k)
        grad.dweight.row<float>(c)[k] += sums[g * size + k * d_inner + c];
      if (grad.dbias) grad.dbias.ptr<float>()[c] += sums[g * size + taps * d_inner + c];
    }
  if (!grad.dstate) return;
  parallel_for(ctx.threads(), num_seqs, [&](int64_t s) {
    ConvPiece piece = piece_of(op, weight, s, op.seq_start.ptr<int32_t>()[s]);
    piece.dstate = f32_rows(grad.dstate, op.slot, s);
    HWY_DYNAMIC_DISPATCH(conv_initial_gradient)(op, grad, piece);
  });
}

}  // namespace krait::cpu
#endif  // HWY_ONCE
