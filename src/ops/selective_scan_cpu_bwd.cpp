// Selective scan on the CPU: backward pass.
//
// A piece is (group of sequences, partition of channels). It goes through its blocks of channels,
// their sequences and, backward, their chunks of kScanChunk tokens. For four states at a time it
// recomputes h and A_bar of the chunk from the saved state before it (16 KiB, first cache) and
// sweeps back:
//   dh_t = dy_t C_t + A_bar_{t+1} dh_{t+1},    dC_t = sum_c dy_t h_t,    dB_t = sum_c dh_t delta_t
//   u_t, du_t = D dy_t + delta_t sum_n dh_t B_t,    ddelta_t = u_t sum_n dh_t B_t + sum_n dh_t
//   A_bar_t h_{t-1} A, dA = sum_t dh_t A_bar_t h_{t-1} delta_t
// What is summed over channels or sequences goes to a buffer of the piece; a last pass adds those
// in the order of the pieces.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/selective_scan_cpu_bwd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/flush_denormals.h"
#include "ops/selective_scan_cpu-inl.h"

#ifndef KRAIT_OPS_SELECTIVE_SCAN_CPU_BWD_ONCE_
#define KRAIT_OPS_SELECTIVE_SCAN_CPU_BWD_ONCE_
namespace krait::cpu {

// The pieces of one backward pass and their buffers, all f32.
struct BackwardPlan {
  int64_t partitions, blocks_per_partition;  // partitions of each group of B and C
  int64_t seq_groups;
  float* dB;     // (partitions, tokens, n_groups, d_state)
  float* dC;     // as dB
  float* param;  // (seq_groups, num_blocks, d_state + 2, kBlock): dA, then dD, then ddt_bias

  int64_t param_offset(const ScanPlan& plan, int64_t seq_group, int64_t block) const {
    return (seq_group * plan.num_blocks + block) * (plan.d_state + 2) * kBlock;
  }
};

}  // namespace krait::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

using cpu::BackwardPlan;
using cpu::kBlock;
using cpu::kScanChunk;
using cpu::ScanPlan;

constexpr float kLn2 = 0.693147181f;
constexpr size_t kChunk = kScanChunk;
constexpr size_t kWidth = kBlock;

// One block of channels over one chunk of tokens: (kChunk, kBlock) each, B and C (kChunk, d_state).
struct BackwardTile {
  HWY_ALIGN float delta[kChunk * kWidth];
  HWY_ALIGN float delta_u[kChunk * kWidth];
  HWY_ALIGN float dy[kChunk * kWidth];      // gradient of C h + D u: after the gate
  HWY_ALIGN float y[kChunk * kWidth];       // C h + D u
  HWY_ALIGN float dh_B[kChunk * kWidth];    // sum over states of dh B
  HWY_ALIGN float dA_bar[kChunk * kWidth];  // sum over states of dh A_bar h_{t-1} A log2(e)
  HWY_ALIGN float B[kChunk * kMaxDState];
  HWY_ALIGN float C[kChunk * kMaxDState];
  HWY_ALIGN float dB[kChunk * 4 * kLanes];  // one sum per lane, for four states
  HWY_ALIGN float dC[kChunk * 4 * kLanes];
};

// Per block of channels: (d_state, kBlock) each.
struct BlockSums {
  HWY_ALIGN float h[kMaxDState * kWidth];  // states before the chunk
  HWY_ALIGN float
      dh[kMaxDState * kWidth];  // gradient of the states after the chunk; then of those before it
  HWY_ALIGN float dA[kMaxDState * kWidth];
  HWY_ALIGN float dD[kWidth], ddt_bias[kWidth];
};

template <class T>
VF load_dt(const SelectiveScan& op, int64_t t, int64_t channel, size_t valid) {
  const DF d;
  const VF dt = load_part(d, op.dt.row<T>(t) + channel, valid);
  return op.dt_bias ? hn::Add(dt, load_part(d, op.dt_bias.ptr<float>() + channel, valid)) : dt;
}

template <class T>
void stage_backward(const SelectiveScan& op, const SelectiveScanGrad& grad, const ScanPlan& plan,
                    int64_t block, int64_t begin, size_t tokens, BackwardTile& tile) {
  const DF d;
  const int64_t c0 = plan.first_channel(block);
  for (size_t i = 0; i < tokens; ++i) {
    const int64_t t = begin + static_cast<int64_t>(i);
    for_each_vector(static_cast<size_t>(plan.channels(block)), [&](size_t c, size_t valid) {
      const int64_t channel = c0 + static_cast<int64_t>(c);
      const size_t at = i * kWidth + c;
      const VF u = load_part(d, op.u.row<T>(t) + channel, valid);
      const VF delta = softplus(d, load_dt<T>(op, t, channel, valid));
      VF dy = load_part(d, grad.dy.row<T>(t) + channel, valid);
      if (op.z) dy = hn::Mul(dy, silu(d, load_part(d, op.z.row<T>(t) + channel, valid)));
      hn::Store(delta, d, tile.delta + at);
      hn::Store(hn::Mul(delta, u), d, tile.delta_u + at);
      hn::Store(dy, d, tile.dy + at);
      hn::Store(op.D ? hn::Mul(load_part(d, op.D.ptr<float>() + channel, valid), u) : hn::Zero(d),
                d, tile.y + at);
      hn::Store(hn::Zero(d), d, tile.dh_B + at);
      hn::Store(hn::Zero(d), d, tile.dA_bar + at);
    });
  }
  stage_rows<T>(op.B, plan.group(block), begin, static_cast<int64_t>(tokens), tile.B);
  stage_rows<T>(op.C, plan.group(block), begin, static_cast<int64_t>(tokens), tile.C);
}

// Where a vector of channels and a group of states lie in the tiles.
struct Place {
  const float* A;  // (d_state, kBlock): A log2(e)
  size_t c, n0, d_state, tokens;
};

// h and A_bar of kStates states for every token of the chunk; y collects C h. h[0] is the state
// before the chunk.
template <int kStates>
HWY_INLINE void recompute(const Place& p, const BlockSums& sums, BackwardTile& tile,
                          float* HWY_RESTRICT h, float* HWY_RESTRICT A_bar) {
  const DF d;
  VF state[kStates];
#pragma GCC unroll 4
  for (int n = 0; n < kStates; ++n) {
    state[n] = hn::Load(d, sums.h + (p.n0 + n) * kWidth + p.c);
    hn::Store(state[n], d, h + n * kLanes);
  }
  for (size_t t = 0; t < p.tokens; ++t) {
    const VF delta = hn::Load(d, tile.delta + t * kWidth + p.c);
    const VF delta_u = hn::Load(d, tile.delta_u + t * kWidth + p.c);
    VF y = hn::Load(d, tile.y + t * kWidth + p.c);
#pragma GCC unroll 4
    for (int n = 0; n < kStates; ++n) {
      const VF a = exp2_product_clamped(d, delta, hn::Load(d, p.A + (p.n0 + n) * kWidth + p.c));
      const VF B = hn::Set(d, tile.B[t * p.d_state + p.n0 + n]),
               C = hn::Set(d, tile.C[t * p.d_state + p.n0 + n]);
      state[n] = hn::MulAdd(a, state[n], hn::Mul(delta_u, B));
      y = hn::MulAdd(state[n], C, y);
      hn::Store(a, d, A_bar + (t * kStates + n) * kLanes);
      hn::Store(state[n], d, h + ((t + 1) * kStates + n) * kLanes);
    }
    hn::Store(y, d, tile.y + t * kWidth + p.c);
  }
}

template <int kStates>
HWY_INLINE void sweep_back(const Place& p, BlockSums& sums, BackwardTile& tile,
                           const float* HWY_RESTRICT h, const float* HWY_RESTRICT A_bar) {
  const DF d;
  VF dh[kStates], dA[kStates], A[kStates];
#pragma GCC unroll 4
  for (int n = 0; n < kStates; ++n) {
    dh[n] = hn::Load(d, sums.dh + (p.n0 + n) * kWidth + p.c);
    dA[n] = hn::Load(d, sums.dA + (p.n0 + n) * kWidth + p.c);
    A[n] = hn::Load(d, p.A + (p.n0 + n) * kWidth + p.c);
  }
  for (size_t t = p.tokens; t-- > 0;) {
    const size_t at = t * kWidth + p.c;
    const VF dy = hn::Load(d, tile.dy + at), delta = hn::Load(d, tile.delta + at);
    const VF delta_u = hn::Load(d, tile.delta_u + at);
    VF dh_B = hn::Load(d, tile.dh_B + at), dA_bar = hn::Load(d, tile.dA_bar + at);
#pragma GCC unroll 4
    for (int n = 0; n < kStates; ++n) {
      const size_t sum = (t * kStates + n) * kLanes;
      const VF B = hn::Set(d, tile.B[t * p.d_state + p.n0 + n]),
               C = hn::Set(d, tile.C[t * p.d_state + p.n0 + n]);
      dh[n] = hn::MulAdd(dy, C, dh[n]);
      hn::Store(hn::MulAdd(dy, hn::Load(d, h + sum + kStates * kLanes), hn::Load(d, tile.dC + sum)),
                d, tile.dC + sum);
      hn::Store(hn::MulAdd(dh[n], delta_u, hn::Load(d, tile.dB + sum)), d, tile.dB + sum);
      dh_B = hn::MulAdd(dh[n], B, dh_B);
      dh[n] = hn::Mul(dh[n], hn::Load(d, A_bar + sum));
      const VF through_A = hn::Mul(dh[n], hn::Load(d, h + sum));
      dA_bar = hn::MulAdd(through_A, A[n], dA_bar);
      dA[n] = hn::MulAdd(through_A, delta, dA[n]);
    }
    hn::Store(dh_B, d, tile.dh_B + at);
    hn::Store(dA_bar, d, tile.dA_bar + at);
  }
#pragma GCC unroll 4
  for (int n = 0; n < kStates; ++n) {
    hn::Store(dh[n], d, sums.dh + (p.n0 + n) * kWidth + p.c);
    hn::Store(dA[n], d, sums.dA + (p.n0 + n) * kWidth + p.c);
  }
}

// kStates states of a whole block over one chunk; adds the sums over channels to rows of dB and dC
// of this piece.
template <int kStates>
void backward_states(Place p, size_t channels, BlockSums& sums, BackwardTile& tile, float* dB,
                     float* dC, size_t stride) {
  const DF d;
  HWY_ALIGN float h[(kChunk + 1) * kStates * kLanes], A_bar[kChunk * kStates * kLanes];
  std::memset(tile.dB, 0, p.tokens * kStates * kLanes * sizeof(float));
  std::memset(tile.dC, 0, p.tokens * kStates * kLanes * sizeof(float));
  for (p.c = 0; p.c < channels; p.c += kLanes) {
    recompute<kStates>(p, sums, tile, h, A_bar);
    sweep_back<kStates>(p, sums, tile, h, A_bar);
  }
  for (size_t t = 0; t < p.tokens; ++t)
    for (size_t n = 0; n < kStates; ++n) {
      const size_t sum = (t * kStates + n) * kLanes;
      dB[t * stride + p.n0 + n] += hn::GetLane(hn::SumOfLanes(d, hn::Load(d, tile.dB + sum)));
      dC[t * stride + p.n0 + n] += hn::GetLane(hn::SumOfLanes(d, hn::Load(d, tile.dC + sum)));
    }
}

template <class T>
void write_backward(const SelectiveScan& op, const SelectiveScanGrad& grad, const ScanPlan& plan,
                    int64_t block, int64_t begin, size_t tokens, const BackwardTile& tile,
                    BlockSums& sums) {
  const DF d;
  const int64_t c0 = plan.first_channel(block);
  for (size_t i = 0; i < tokens; ++i) {
    const int64_t t = begin + static_cast<int64_t>(i);
    for_each_vector(static_cast<size_t>(plan.channels(block)), [&](size_t c, size_t valid) {
      const int64_t channel = c0 + static_cast<int64_t>(c);
      const size_t at = i * kWidth + c;
      const VF u = load_part(d, op.u.row<T>(t) + channel, valid), dy = hn::Load(d, tile.dy + at);
      const VF dh_B = hn::Load(d, tile.dh_B + at);
      VF du = hn::Mul(hn::Load(d, tile.delta + at), dh_B);
      if (op.D) du = hn::MulAdd(load_part(d, op.D.ptr<float>() + channel, valid), dy, du);
      const VF ddelta =
          hn::MulAdd(hn::Load(d, tile.dA_bar + at), hn::Set(d, kLn2), hn::Mul(u, dh_B));
      const VF ddt = hn::Mul(ddelta, sigmoid(d, load_dt<T>(op, t, channel, valid)));
      store_part(d, ddt, grad.ddt.row<T>(t) + channel, valid);
      hn::Store(hn::Add(hn::Load(d, sums.ddt_bias + c), ddt), d, sums.ddt_bias + c);
      hn::Store(hn::MulAdd(dy, u, hn::Load(d, sums.dD + c)), d, sums.dD + c);
      const VF y = hn::Load(d, tile.y + at);
      if (grad.y && !op.z) store_part(d, y, grad.y.row<T>(t) + channel, valid);
      if (op.z) {
        const VF z = load_part(d, op.z.row<T>(t) + channel, valid), s = sigmoid(d, z);
        if (grad.y) store_part(d, hn::Mul(y, hn::Mul(z, s)), grad.y.row<T>(t) + channel, valid);
        const VF slope = hn::Mul(s, hn::MulAdd(z, hn::Sub(hn::Set(d, 1.0f), s), hn::Set(d, 1.0f)));
        const VF dz = hn::Mul(hn::Mul(load_part(d, grad.dy.row<T>(t) + channel, valid), y), slope);
        store_part(d, dz, grad.dz.row<T>(t) + channel, valid);
      }
      store_part(d, du, grad.du.row<T>(t) + channel, valid);  // dy has been read
    });
  }
}

void load_saved(const float* saved, size_t channels, size_t d_state, float* h) {
  const DF d;
  for (size_t n = 0; n < d_state; ++n)
    for_each_vector(channels, [&](size_t c, size_t valid) {
      hn::Store(load_part(d, saved + n * channels + c, valid), d, h + n * kWidth + c);
    });
}

// One block of channels of one sequence, last chunk first.
template <class T>
void backward_sequence(const SelectiveScan& op, const SelectiveScanGrad& grad, const ScanPlan& plan,
                       const BackwardPlan& back, int64_t partition, int64_t sequence, int64_t block,
                       BlockSums& sums, BackwardTile& tile) {
  const size_t channels = static_cast<size_t>(plan.channels(block)),
               d_state = static_cast<size_t>(plan.d_state);
  const int64_t c0 = plan.first_channel(block), begin = plan.start[sequence],
                end = plan.start[sequence + 1];
  const size_t stride = static_cast<size_t>(op.B.shape[1]) * d_state;
  float* dstate = cpu::state_of(grad.dstate, op.slot, sequence, c0);
  cpu::load_states(dstate, plan.channels(block), plan.d_state, sums.dh);
  const int64_t chunks = (end - begin + kScanChunk - 1) / kScanChunk;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t t = begin + chunk * kScanChunk;
    const size_t tokens = static_cast<size_t>(std::min(kScanChunk, end - t));
    if (chunk > 0)
      load_saved(op.saved.ptr<float>() + plan.saved_offset(t, block), channels, d_state, sums.h);
    else
      cpu::load_states(cpu::state_of(op.state, op.slot, sequence, c0), plan.channels(block),
                       plan.d_state, sums.h);
    stage_backward<T>(op, grad, plan, block, t, tokens, tile);
    for (const Tensor* x : {&op.u, &op.dt, &op.z, &grad.dy, &grad.du, &grad.ddt, &grad.dz})
      prefetch_rows<T>(*x, std::max(begin, t - kScanChunk), t, c0, plan.channels(block));
    const size_t row =
        (static_cast<size_t>(partition * op.u.shape[0] + t) * static_cast<size_t>(op.B.shape[1]) +
         static_cast<size_t>(plan.group(block))) *
        d_state;
    Place p = {plan.A_of(block), 0, 0, d_state, tokens};
    for (; p.n0 + 4 <= d_state; p.n0 += 4)
      backward_states<4>(p, channels, sums, tile, back.dB + row, back.dC + row, stride);
    for (; p.n0 < d_state; ++p.n0)
      backward_states<1>(p, channels, sums, tile, back.dB + row, back.dC + row, stride);
    write_backward<T>(op, grad, plan, block, t, tokens, tile, sums);
  }
  if (dstate) cpu::store_states(sums.dh, plan.channels(block), plan.d_state, dstate);
}

template <class T>
void backward_piece(const SelectiveScan& op, const SelectiveScanGrad& grad, const ScanPlan& plan,
                    const BackwardPlan& back, int64_t seq_group, int64_t group, int64_t partition) {
  const FlushDenormals flush;
  BlockSums sums;
  BackwardTile tile;
  const int64_t first = group * plan.blocks_per_group + partition * back.blocks_per_partition;
  const int64_t last =
      std::min(first + back.blocks_per_partition, (group + 1) * plan.blocks_per_group);
  const size_t d_state = static_cast<size_t>(plan.d_state);
  for (int64_t block = first; block < last; ++block) {
    std::memset(sums.dA, 0, d_state * kWidth * sizeof(float));
    std::memset(sums.dD, 0, sizeof sums.dD);
    std::memset(sums.ddt_bias, 0, sizeof sums.ddt_bias);
    const int64_t seq_begin = plan.num_seqs * seq_group / back.seq_groups;
    const int64_t seq_end = plan.num_seqs * (seq_group + 1) / back.seq_groups;
    for (int64_t s = seq_begin; s < seq_end; ++s)
      backward_sequence<T>(op, grad, plan, back, partition, s, block, sums, tile);
    float* param = back.param + back.param_offset(plan, seq_group, block);
    std::memcpy(param, sums.dA, d_state * kWidth * sizeof(float));
    std::memcpy(param + d_state * kWidth, sums.dD, sizeof sums.dD);
    std::memcpy(param + (d_state + 1) * kWidth, sums.ddt_bias, sizeof sums.ddt_bias);
  }
}

void scan_backward_piece(const SelectiveScan& op, const SelectiveScanGrad& grad,
                         const ScanPlan& plan, const BackwardPlan& back, int64_t piece) {
  const int64_t partition = piece % back.partitions, rest = piece / back.partitions;
  const int64_t n_groups = op.B.shape[1], group = rest % n_groups, seq_group = rest / n_groups;
  if (op.u.dtype == DType::f32)
    return backward_piece<float>(op, grad, plan, back, seq_group, group, partition);
  backward_piece<krait::bf16>(op, grad, plan, back, seq_group, group, partition);
}

// Rows [begin, end) of dB or dC: the partitions' sums, in order.
template <class T>
void add_partitions(const float* sums, int64_t partitions, const Tensor& out, int64_t begin,
                    int64_t end) {
  const DF d;
  const int64_t row = out.shape[1] * out.shape[2], all = out.shape[0] * row;
  for (int64_t t = begin; t < end; ++t)
    for (int64_t g = 0; g < out.shape[1]; ++g) {
      const float* from = sums + t * row + g * out.shape[2];
      T* to = out.row<T>(t) + g * out.stride[1];
      for_each_vector(static_cast<size_t>(out.shape[2]), [&](size_t n, size_t valid) {
        VF sum = load_part(d, from + n, valid);
        for (int64_t p = 1; p < partitions; ++p)
          sum = hn::Add(sum, load_part(d, from + p * all + static_cast<int64_t>(n), valid));
        store_part(d, sum, to + n, valid);
      });
    }
}

void scan_add_partitions(const float* sums, int64_t partitions, const Tensor& out, int64_t begin,
                         int64_t end) {
  if (out.dtype == DType::f32) return add_partitions<float>(sums, partitions, out, begin, end);
  add_partitions<krait::bf16>(sums, partitions, out, begin, end);
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cstring>

#include "core/threads.h"
#include "ops/engine.h"

namespace krait {
HWY_EXPORT(scan_backward_piece);
HWY_EXPORT(scan_add_partitions);
}  // namespace krait

namespace krait::cpu {
namespace {

// Adds the parameter gradients of every group of sequences, in order.
void add_parameters(const SelectiveScanGrad& grad, const ScanPlan& plan, const BackwardPlan& back,
                    int64_t block) {
  const int64_t c0 = plan.first_channel(block), N = plan.d_state;
  for (int64_t g = 0; g < back.seq_groups; ++g) {
    const float* param = back.param + back.param_offset(plan, g, block);
    for (int64_t c = 0; c < plan.channels(block); ++c) {
      float* dA = grad.dA.row<float>(c0 + c);
      for (int64_t n = 0; n < N; ++n) dA[n] += param[n * kBlock + c];
      if (grad.dD) grad.dD.ptr<float>()[c0 + c] += param[N * kBlock + c];
      if (grad.ddt_bias) grad.ddt_bias.ptr<float>()[c0 + c] += param[(N + 1) * kBlock + c];
    }
  }
}

}  // namespace

void selective_scan_bwd(Context& ctx, const SelectiveScan& given, const SelectiveScanGrad& grad) {
  Arena& arena = ctx.workspace();
  const Arena::Scope scope(arena);
  SelectiveScan op = given;
  ScanPlan plan(op);
  const int64_t tokens = op.u.shape[0], n_groups = op.B.shape[1];
  prepare_A(ctx, op, plan);
  if (!op.saved) {
    op.saved = arena.tensor(DType::f32,
                            {selective_scan_saved_size(ctx, tokens, plan.d_inner, plan.d_state)});
    SelectiveScan states_only = op;
    states_only.y = Tensor();
    scan_forward(ctx, states_only, plan);
  }
  BackwardPlan back;
  back.blocks_per_partition = (plan.blocks_per_group + 7) / 8;
  back.partitions =
      (plan.blocks_per_group + back.blocks_per_partition - 1) / back.blocks_per_partition;
  back.seq_groups = std::clamp<int64_t>(plan.num_seqs, 1, 8);
  const int64_t rows = back.partitions * tokens * n_groups * plan.d_state;
  back.dB = arena.array<float>(2 * rows);
  back.dC = back.dB + rows;
  std::memset(back.dB, 0, static_cast<size_t>(2 * rows) * sizeof(float));
  back.param = arena.array<float>(back.param_offset(plan, back.seq_groups, 0));
  parallel_for(ctx.threads(), back.seq_groups * n_groups * back.partitions, [&](int64_t piece) {
    HWY_DYNAMIC_DISPATCH(scan_backward_piece)(op, grad, plan, back, piece);
  });
  parallel_ranges(ctx.threads(), tokens, 64, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(scan_add_partitions)(back.dB, back.partitions, grad.dB, begin, end);
    HWY_DYNAMIC_DISPATCH(scan_add_partitions)(back.dC, back.partitions, grad.dC, begin, end);
  });
  parallel_ranges(ctx.threads(), plan.num_blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) add_parameters(grad, plan, back, block);
  });
}

}  // namespace krait::cpu
#endif  // HWY_ONCE
