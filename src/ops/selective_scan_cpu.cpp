// Selective scan on the CPU: forward pass and single step. See selective_scan_cpu.h for the cut
// into pieces.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/selective_scan_cpu.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/flush_denormals.h"
#include "ops/selective_scan_cpu-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

using cpu::kBlock;
using cpu::kScanChunk;
using cpu::ScanPlan;

constexpr float kLog2e = 1.44269504f;

// One block of channels over one chunk of tokens, in f32: (kScanChunk, kBlock) each.
struct ForwardTile {
  HWY_ALIGN float delta[kScanChunk * kBlock];
  HWY_ALIGN float delta_u[kScanChunk * kBlock];
  HWY_ALIGN float y[kScanChunk * kBlock];
  HWY_ALIGN float B[kScanChunk * kMaxDState];  // (kScanChunk, d_state)
  HWY_ALIGN float C[kScanChunk * kMaxDState];
  // The block's channels in u, dt, z and y at the next tile's first row, and the bytes between
  // rows: fetched while this tile is scanned, a line at a time, because rows lie too far apart for
  // the hardware to guess the next one.
  const char* next[4];
  size_t next_stride[4], element_size;
};

template <class T>
void look_ahead(const SelectiveScan& op, int64_t c0, int64_t row, ForwardTile& tile) {
  tile.element_size = sizeof(T);
  size_t i = 0;
  for (const Tensor* x : {&op.u, &op.dt, &op.z, &op.y}) {
    const Tensor& there = *x ? *x : op.u;
    tile.next[i] = reinterpret_cast<const char*>(there.row<T>(row) + c0);
    tile.next_stride[i++] = static_cast<size_t>(there.stride[0]) * sizeof(T);
  }
}

// delta, delta u, and y = D u: what does not depend on the states.
template <class T>
void stage_tile(const SelectiveScan& op, const ScanPlan& plan, int64_t block, int64_t begin,
                int64_t tokens, ForwardTile& tile) {
  const DF d;
  const int64_t c0 = plan.first_channel(block);
  const size_t channels = static_cast<size_t>(plan.channels(block));
  const float* bias = op.dt_bias ? op.dt_bias.ptr<float>() + c0 : nullptr;
  const float* D = op.D ? op.D.ptr<float>() + c0 : nullptr;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* u_row = op.u.row<T>(begin + t) + c0;
    const T* dt_row = op.dt.row<T>(begin + t) + c0;
    const int64_t at = t * kBlock;
    for_each_vector(channels, [&](size_t c, size_t valid) {
      const VF u = load_part(d, u_row + c, valid);
      VF dt = load_part(d, dt_row + c, valid);
      if (bias) dt = hn::Add(dt, load_part(d, bias + c, valid));
      const VF delta = softplus(d, dt);
      hn::Store(delta, d, tile.delta + at + c);
      hn::Store(hn::Mul(delta, u), d, tile.delta_u + at + c);
      hn::Store(D ? hn::Mul(load_part(d, D + c, valid), u) : hn::Zero(d), d, tile.y + at + c);
    });
  }
  stage_rows<T>(op.B, plan.group(block), begin, tokens, tile.B);
  stage_rows<T>(op.C, plan.group(block), begin, tokens, tile.C);
}

// kStates states of one vector of channels, over the tokens of a tile: the states stay in
// registers, y collects C h. One exp2 and four multiply-adds for each (token, channel, state).
template <int kStates, bool kClamp>
HWY_INLINE void scan_states(const float* HWY_RESTRICT A, float* HWY_RESTRICT h, ForwardTile& tile,
                            size_t c, size_t n0, size_t d_state, size_t tokens) {
  const DF d;
  VF state[kStates];
#pragma GCC unroll 16
  for (int n = 0; n < kStates; ++n) state[n] = hn::Load(d, h + (n0 + n) * kBlock + c);
  const size_t fetch = n0 / 8 % 2 * 2;  // this group of states fetches for two of the four tensors
  const char* next[2] = {tile.next[fetch] + c * tile.element_size,
                         tile.next[fetch + 1] + c * tile.element_size};
  for (size_t t = 0; t < tokens; ++t) {
    hwy::Prefetch(next[0] + t * tile.next_stride[fetch]);
    hwy::Prefetch(next[1] + t * tile.next_stride[fetch + 1]);
    const VF delta = hn::Load(d, tile.delta + t * kBlock + c);
    const VF delta_u = hn::Load(d, tile.delta_u + t * kBlock + c);
    const float* HWY_RESTRICT B = tile.B + t * d_state + n0;
    const float* HWY_RESTRICT C = tile.C + t * d_state + n0;
    VF y[2] = {hn::Load(d, tile.y + t * kBlock + c), hn::Zero(d)};
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) {
      const VF A_n = hn::Load(d, A + (n0 + n) * kBlock + c);
      const VF A_bar = kClamp ? exp2_product_clamped(d, delta, A_n) : exp2_product(d, delta, A_n);
      state[n] = hn::MulAdd(A_bar, state[n], hn::Mul(delta_u, hn::Set(d, B[n])));
      y[n % 2] = hn::MulAdd(state[n], hn::Set(d, C[n]), y[n % 2]);
    }
    hn::Store(hn::Add(y[0], y[1]), d, tile.y + t * kBlock + c);
  }
#pragma GCC unroll 16
  for (int n = 0; n < kStates; ++n) hn::Store(state[n], d, h + (n0 + n) * kBlock + c);
}

// Whether delta A stays above -126 for one vector of channels over a tile, as it does in any sane
// model.
HWY_INLINE bool exps_are_moderate(const float* HWY_RESTRICT A, const float* HWY_RESTRICT delta,
                                  size_t c, size_t d_state, size_t tokens) {
  const DF d;
  VF lowest = hn::Zero(d), largest = hn::Zero(d);
  for (size_t n = 0; n < d_state; ++n) lowest = hn::Min(lowest, hn::Load(d, A + n * kBlock + c));
  for (size_t t = 0; t < tokens; ++t)
    largest = hn::Max(largest, hn::Load(d, delta + t * kBlock + c));
  return hn::AllTrue(d, hn::Gt(hn::Mul(lowest, largest), hn::Set(d, -126.0f)));
}

template <bool kClamp>
void scan_vector(const float* A, float* h, ForwardTile& tile, size_t c, size_t d_state,
                 size_t tokens) {
  size_t n = 0;
  for (; n + 8 <= d_state; n += 8) scan_states<8, kClamp>(A, h, tile, c, n, d_state, tokens);
  for (; n + 4 <= d_state; n += 4) scan_states<4, kClamp>(A, h, tile, c, n, d_state, tokens);
  for (; n < d_state; ++n) scan_states<1, kClamp>(A, h, tile, c, n, d_state, tokens);
}

void scan_tile(const float* A, float* h, ForwardTile& tile, size_t channels, size_t d_state,
               size_t tokens) {
  for (size_t c = 0; c < channels; c += kLanes) {
    if (exps_are_moderate(A, tile.delta, c, d_state, tokens))
      scan_vector<false>(A, h, tile, c, d_state, tokens);
    else
      scan_vector<true>(A, h, tile, c, d_state, tokens);
  }
}

template <class T>
void write_tile(const SelectiveScan& op, const ScanPlan& plan, int64_t block, int64_t begin,
                int64_t tokens, const ForwardTile& tile) {
  const DF d;
  const int64_t c0 = plan.first_channel(block);
  for (int64_t t = 0; t < tokens; ++t) {
    T* y_row = op.y.row<T>(begin + t) + c0;
    const T* z_row = op.z ? op.z.row<T>(begin + t) + c0 : nullptr;
    for_each_vector(static_cast<size_t>(plan.channels(block)), [&](size_t c, size_t valid) {
      VF y = hn::Load(d, tile.y + t * kBlock + static_cast<int64_t>(c));
      if (z_row) y = hn::Mul(y, silu(d, load_part(d, z_row + c, valid)));
      store_part(d, y, y_row + c, valid);
    });
  }
}

template <class T>
void forward_piece(const SelectiveScan& op, const ScanPlan& plan, int64_t sequence, int64_t block) {
  const FlushDenormals flush;
  const DF d;
  HWY_ALIGN float h[kMaxDState * kBlock];
  ForwardTile tile;
  const int64_t channels = plan.channels(block), begin = plan.start[sequence],
                end = plan.start[sequence + 1];
  cpu::load_initial_states(op, plan, sequence, block, h);
  for (int64_t t = begin; t < end; t += kScanChunk) {
    const int64_t tokens = std::min(kScanChunk, end - t);
    if (op.saved && t > begin) {
      float* to = op.saved.ptr<float>() + plan.saved_offset(t, block);
      for (int64_t n = 0; n < plan.d_state; ++n)
        for_each_vector(static_cast<size_t>(channels), [&](size_t c, size_t valid) {
          store_part(d, hn::Load(d, h + n * kBlock + static_cast<int64_t>(c)),
                     to + n * channels + static_cast<int64_t>(c), valid);
        });
    }
    stage_tile<T>(op, plan, block, t, tokens, tile);
    look_ahead<T>(op, plan.first_channel(block), std::min(t + tokens, end - 1), tile);
    scan_tile(plan.A_of(block), h, tile, static_cast<size_t>(channels),
              static_cast<size_t>(plan.d_state), static_cast<size_t>(tokens));
    if (op.y) write_tile<T>(op, plan, block, t, tokens, tile);
  }
  if (op.y) cpu::store_final_states(op, plan, sequence, block, h);
}

void scan_forward_piece(const SelectiveScan& op, const ScanPlan& plan, int64_t sequence,
                        int64_t block) {
  if (op.u.dtype == DType::f32) return forward_piece<float>(op, plan, sequence, block);
  forward_piece<krait::bf16>(op, plan, sequence, block);
}

void scan_prepare_A(const SelectiveScan& op, const ScanPlan& plan, int64_t block, float* out) {
  const int64_t channels = plan.channels(block), N = plan.d_state;
  cpu::load_states(op.A.row<float>(plan.first_channel(block)), channels, N, out);
  for (int64_t i = 0; i < N * kBlock; ++i) out[i] *= kLog2e;
}

// One token of channels [c0, c1) of one sequence. Lanes are states here: they lie together in
// memory.
template <class T, class S>
void step_piece(const SelectiveScan& op, int64_t s, int64_t c0, int64_t c1) {
  const FlushDenormals flush;
  const DF d;
  const size_t d_state = static_cast<size_t>(op.A.shape[1]);
  const int64_t per_group = op.u.shape[1] / op.B.shape[1];
  HWY_ALIGN float delta[kBlock], u[kBlock], y[kBlock], B[kMaxDState + kLanes],
      C[kMaxDState + kLanes];
  int64_t staged_group = -1;
  for (int64_t base = c0; base < c1; base += kBlock) {
    const size_t channels = static_cast<size_t>(std::min(kBlock, c1 - base));
    for_each_vector(channels, [&](size_t c, size_t valid) {
      VF dt = load_part(d, op.dt.row<T>(s) + base + c, valid);
      if (op.dt_bias) dt = hn::Add(dt, load_part(d, op.dt_bias.ptr<float>() + base + c, valid));
      hn::Store(softplus(d, dt), d, delta + c);
      hn::Store(load_part(d, op.u.row<T>(s) + base + c, valid), d, u + c);
    });
    for (size_t c = 0; c < channels; ++c) {
      const int64_t channel = base + static_cast<int64_t>(c);
      if (channel / per_group != staged_group) {
        staged_group = channel / per_group;
        stage_rows<T>(op.B, staged_group, s, 1, B);
        stage_rows<T>(op.C, staged_group, s, 1, C);
      }
      S* h = cpu::state_of<S>(op.state, op.slot, s, channel);
      const float* A = op.A.row<float>(channel);
      const VF scale = hn::Set(d, delta[c] * kLog2e), delta_u = hn::Set(d, delta[c] * u[c]);
      VF sum = hn::Zero(d);
      for_each_vector(d_state, [&](size_t n, size_t valid) {
        const VF A_bar = exp2_product_clamped(d, scale, load_part(d, A + n, valid));
        const VF state = hn::MulAdd(A_bar, load_part(d, h + n, valid),
                                    hn::Mul(delta_u, load_part(d, B + n, valid)));
        store_part(d, state, h + n, valid);
        sum = hn::MulAdd(state, load_part(d, C + n, valid), sum);
      });
      y[c] = hn::GetLane(hn::SumOfLanes(d, sum));
    }
    for_each_vector(channels, [&](size_t c, size_t valid) {
      VF v = hn::Load(d, y + c);
      if (op.D)
        v = hn::MulAdd(load_part(d, op.D.ptr<float>() + base + c, valid), hn::Load(d, u + c), v);
      if (op.z) v = hn::Mul(v, silu(d, load_part(d, op.z.row<T>(s) + base + c, valid)));
      store_part(d, v, op.y.row<T>(s) + base + c, valid);
    });
  }
}

void scan_step_piece(const SelectiveScan& op, int64_t s, int64_t c0, int64_t c1) {
  dispatch_f32_bf16(op.u.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (op.state.dtype == DType::f32) return step_piece<T, float>(op, s, c0, c1);
    step_piece<T, krait::bf16>(op, s, c0, c1);
  });
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "core/threads.h"
#include "ops/engine.h"

namespace krait {
HWY_EXPORT(scan_forward_piece);
HWY_EXPORT(scan_prepare_A);
HWY_EXPORT(scan_step_piece);
}  // namespace krait

namespace krait::cpu {

void prepare_A(Context& ctx, const SelectiveScan& op, ScanPlan& plan) {
  float* A = ctx.workspace().array<float>(plan.num_blocks * plan.d_state * kBlock);
  parallel_ranges(ctx.threads(), plan.num_blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      HWY_DYNAMIC_DISPATCH(scan_prepare_A)(op, plan, b, A + b * plan.d_state * kBlock);
  });
  plan.A_log2e = A;
}

void scan_forward(Context& ctx, const SelectiveScan& op, const ScanPlan& plan) {
  parallel_for(ctx.threads(), plan.num_seqs * plan.num_blocks, [&](int64_t piece) {
    HWY_DYNAMIC_DISPATCH(scan_forward_piece)
    (op, plan, piece / plan.num_blocks, piece % plan.num_blocks);
  });
}

void selective_scan_fwd(Context& ctx, const SelectiveScan& op) {
  const Arena::Scope scope(ctx.workspace());
  ScanPlan plan(op);
  prepare_A(ctx, op, plan);
  scan_forward(ctx, op, plan);
}

void selective_scan_step(Context& ctx, const SelectiveScan& op) {
  // A piece should be some microseconds of work: 8192 states or more.
  const int64_t d_inner = op.u.shape[1], num_seqs = op.u.shape[0];
  const int64_t wanted = num_seqs >= ctx.threads() ? 1 : ctx.threads();
  const int64_t pieces = std::clamp<int64_t>(d_inner * op.A.shape[1] / 8192, 1, wanted);
  const int64_t width = ((d_inner + pieces - 1) / pieces + kBlock - 1) / kBlock * kBlock;
  parallel_for(ctx.threads(), num_seqs * pieces, [&](int64_t i) {
    const int64_t c0 = i % pieces * width;
    if (c0 < d_inner)
      HWY_DYNAMIC_DISPATCH(scan_step_piece)(op, i / pieces, c0, std::min(d_inner, c0 + width));
  });
}

}  // namespace krait::cpu
#endif  // HWY_ONCE
